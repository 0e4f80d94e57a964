"""A repository of the Hugging Face hub as timm and transformers' TimmWrapper load it: a folder with `config.json`,
`model.safetensors` and a model card.

The fields of `config.json` are those that timm/models/_hub.py writes (`save_config_for_hf`).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from convert import metadata
from convert.errors import ConversionError, listed
from convert.files import write_bytes
from convert.formats.run_folder import CURVES
from convert.weights import Weights
from crossvit_jax.config import TIMM_NAMES, VARIANTS, CrossViTConfig, DenseConfig
from crossvit_jax.files import read_json, read_regular
from crossvit_jax.preprocess import MEAN, STD

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
HF_FILES = (WEIGHTS, CONFIG, CARD, CURVES)  # what is written, the weights always
ANY = "OWNER/REPOSITORY"  # in the card, until it is known where it will be
INDEX = "model.safetensors.index.json"  # of weights in several files
_LARGEST_PICTURE = 2**26  # bytes
# what timm's variants fix
_FIXED = ("embed_dim", "depth", "num_heads", "attention", "fusion_depth", "multi_conv", "stages")


def weights_in(folder: Path) -> Path | None:
    """The file of the weights in a folder, under one of the names that the hub's libraries give them, or the index of
    several; None where it has neither."""
    names = (WEIGHTS, INDEX, "pytorch_model.bin")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def shards(index: Path) -> list[Path]:
    """The files that an index of weights names, beside it. Raises ConversionError if it is damaged, or one is not."""
    names = shard_names(index)
    missing = [name for name in names if not index.with_name(name).is_file()]
    if missing:
        raise ConversionError(f"{listed(missing)} of {index} does not exist")
    return [index.with_name(name) for name in names]


def shard_names(index: Path) -> list[str]:
    """The names of the files that an index of weights names. Raises ConversionError if it is damaged."""
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConversionError(f"{index} is a damaged index: it has no weight_map of names and files") from None
    if not names or not all(isinstance(name, str) and name == Path(name).name for name in names):
        raise ConversionError(f"{index} names files that do not lie beside it")
    return names


def write_hf(weights: Weights, folder: Path) -> None:
    """Writes the folder of a model that `check_for_timm` has nothing against."""
    from safetensors.numpy import save

    folder.mkdir()
    description = json.dumps(metadata.describe_weights(weights))
    tensors = {name: np.ascontiguousarray(array) for name, array in weights.tensors.items()}
    about = {"format": "pt", metadata.KEY: description}
    write_bytes(folder / WEIGHTS, save(tensors, metadata=metadata.with_digest(tensors, about)))
    write_bytes(folder / CONFIG, (json.dumps(_config(weights), indent=2) + "\n").encode())
    curves = _curves(weights)
    if curves is not None:
        write_bytes(folder / CURVES, curves)
    write_bytes(folder / CARD, _card(weights, with_curves=curves is not None).encode())


def check_for_timm(config: CrossViTConfig | DenseConfig) -> None:
    """Raises ConversionError for a model that timm cannot make, or makes so that it fails when it runs."""
    if config.task != "classification":
        raise ConversionError(f"timm has no model for {config.task}: .safetensors keeps it")
    if any(branch.head_dim for branch in config.branches):
        raise ConversionError("timm has no attention without some of its heads: .safetensors keeps such a model")
    if any(branch.attention != "full" for branch in config.branches):
        raise ConversionError("timm's CrossViT has full attention alone: .safetensors keeps such a model")
    if config.name not in TIMM_NAMES:
        raise ConversionError(f"timm has no model with the branches of {config.name}: .safetensors keeps them")
    usual = VARIANTS[config.name]
    other = [f"{name} {getattr(config, name)}" for name in _FIXED if getattr(config, name) != getattr(usual, name)]
    if other:
        raise ConversionError(
            f"timm's {TIMM_NAMES[config.name]} has no {' and no '.join(other)}: .safetensors keeps it"
        )
    # timm rounds the sizes of the branches' images down, from a floating-point scale
    theirs = [tuple(int(side * float(scale)) for side in config.image_size) for scale in config.image_scale]
    if theirs != list(config.branch_image_size):
        told = " and ".join(f"{height} x {width}" for height, width in theirs)
        raise ConversionError(f"in timm the branches would see {told} pixels, which its model cannot run on")


def model_args(config: CrossViTConfig) -> dict[str, Any]:
    """The arguments besides those of the variant that timm's model is made with, as JSON values."""
    height, width = config.image_size
    usual = VARIANTS[config.name]
    args: dict[str, Any] = {
        "img_size": height if height == width else [height, width],
        "img_scale": [float(scale) for scale in config.image_scale],
    }
    if config.mlp_ratio != usual.mlp_ratio:
        args["mlp_ratio"] = [*config.mlp_ratio, 1.0]  # the last number is of no block
    fields = ("patch_size", "qkv_bias", "global_pool", "crop_scale")
    return args | {name: getattr(config, name) for name in fields if getattr(config, name) != getattr(usual, name)}


def _config(weights: Weights) -> dict[str, Any]:
    config = weights.config
    conv = ".0" * config.multi_conv
    branches = range(len(config.branches))
    said: dict[str, Any] = {
        "architecture": TIMM_NAMES[config.name],
        "num_classes": config.num_classes,
        "num_features": sum(branch.embed_dim for branch in config.branches),
        "global_pool": config.global_pool,
    }
    if weights.class_names is not None:
        said["label_names"] = list(weights.class_names)
    return said | {
        "model_args": model_args(config),
        "pretrained_cfg": {
            "num_classes": config.num_classes,
            "input_size": [config.in_chans, *config.image_size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": config.crop_pct,
            "crop_mode": "center",
            "mean": list(MEAN),
            "std": list(STD),
            "first_conv": [f"patch_embed.{i}.proj{conv}" for i in branches],
            "classifier": [f"head.{i}" for i in branches],
            "license": weights.license.lower(),
        },
    }


def _curves(weights: Weights) -> bytes | None:
    """The picture of the run's curves; None where there is none that can be read."""
    try:
        return None if weights.curves is None else read_regular(weights.curves, at_most=_LARGEST_PICTURE)
    except OSError:
        return None


def _card(weights: Weights, *, with_curves: bool) -> str:
    """The model card: what the model is, how it is used, and of a run how it came about."""
    from huggingface_hub import ModelCardData

    config = weights.config
    data = ModelCardData(
        license=weights.license.lower(),
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "crossvit"],
    )
    size = " x ".join(map(str, config.image_size))
    resized = " x ".join(str(int(side / config.crop_pct)) for side in config.image_size)
    lines = [
        "---",
        data.to_yaml(),
        "---",
        "",
        f"# CrossViT {config.name}, {config.num_classes} classes",
        "",
        f"A CrossViT (arXiv 2103.14899), `{TIMM_NAMES[config.name]}` of timm, for images of {size} pixels: resized, "
        f"bicubic, until they cover {resized}, the centre cut out, ImageNet's mean and standard deviation.",
        "",
        "```python",
        "import timm",
        "",
        f'model = timm.create_model("hf-hub:{ANY}", pretrained=True)  # or local-dir:FOLDER',
        "```",
    ]
    if weights.origin:
        lines += ["", f"These are {weights.origin}."]
    if weights.trained:
        lines += ["", "## Training", "", "| setting | value |", "| --- | --- |"]
        lines += [f"| {name} | {value} |" for name, value in weights.trained.items()]
    if with_curves:
        lines += ["", f"![loss, accuracy and learning rate over the steps]({CURVES})"]
    if weights.class_names is not None and len(weights.class_names) <= 50:
        lines += ["", "## Classes", "", ", ".join(f"`{name}`" for name in weights.class_names)]
    return "\n".join(lines) + "\n"
