"""The `config.json` that timm puts beside weights: what it says of them and of their images.

Pooling, cropping and the names of the classes are taken over. Images are prepared in one way only so far: weights for
another are refused, also where transformers' `preprocessor_config.json` asks for it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.errors import ConversionError, one_line
from convert.formats.hf_folder import INDEX
from crossvit_jax.config import CrossViTConfig, get_config
from crossvit_jax.files import read_json
from crossvit_jax.preprocess import MEAN, STD

FILE, PROCESSOR = "config.json", "preprocessor_config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the names of the weights that it belongs to
_NAMED = (*WEIGHTS, INDEX)
_PREPARED = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "crop_mode": "center"}
_RESAMPLING = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by Pillow's numbers


def read_beside(weights: Path) -> dict[str, Any] | None:
    """What the files beside a file of weights say, by timm's names in one dict; None where they say nothing of it.

    Raises:
        ConversionError: one is damaged.
    """
    is_named = weights.name in _NAMED  # as a repository has it; what is beside another may be somebody else's
    said = _read(weights.with_name(FILE), needed=is_named)
    # older files have all in one dict; arguments of the model are what it was made with
    parts = (said.get("pretrained_cfg"), said, said.get("model_args"))
    flat = {key: value for part in parts if isinstance(part, dict) for key, value in part.items() if value is not None}
    labels = next((flat[key] for key in ("label_names", "labels", "id2label") if key in flat), None)
    flat["label_names"] = None if _is_placeholder(labels) else labels
    flat["images_by"] = FILE
    if is_named and not flat.keys() & _PREPARED.keys():
        flat |= _prepared_by(_read(weights.with_name(PROCESSOR), needed=True))
    if not isinstance(said.get("architecture"), str):
        if not is_named or not (flat["label_names"] or flat.keys() & _PREPARED.keys()):
            return None
        flat["architecture"] = ""  # it does not tell whose images it is about, and can mean these alone
    elif not is_named and _variant(said["architecture"]) is None:
        return None
    return flat


def _read(file: Path, *, needed: bool) -> dict[str, Any]:
    """The dict in a file; an empty one where there is none. Raises ConversionError if it is needed and damaged."""
    try:
        said = read_json(file)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        if not needed:
            return {}
        raise ConversionError(f"{file} cannot be read: {getattr(error, 'strerror', None) or one_line(error)}") from None
    return said if isinstance(said, dict) else {}


def _is_placeholder(labels: Any) -> bool:
    """Whether they are transformers' names of classes that nobody has named."""
    return isinstance(labels, dict) and all(name == f"LABEL_{index}" for index, name in labels.items())


def _prepared_by(processor: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers' image processor does to images, by timm's names."""
    resample = processor.get("resample")
    is_known = isinstance(resample, int) and 0 <= resample < len(_RESAMPLING)
    said = {
        "mean": processor.get("image_mean"),
        "std": processor.get("image_std"),
        "interpolation": _RESAMPLING[resample] if is_known else resample,
    }
    if processor.get("do_normalize") is False:
        said |= {"mean": [0, 0, 0], "std": [1, 1, 1]}
    return {key: value for key, value in said.items() if value is not None} | {"images_by": PROCESSOR}


def honour(
    config: CrossViTConfig, class_names: tuple[str, ...] | None, said: Mapping[str, Any]
) -> tuple[CrossViTConfig, tuple[str, ...] | None, list[str]]:
    """The settings and class names with what timm's file says, and notes on what it changed.

    Args:
        class_names: known from elsewhere, which count more.
        said: what `read_beside` returns.

    Raises:
        ConversionError: it belongs to another variant, or wants images prepared otherwise than is done here.
    """
    variant = _variant(said["architecture"])
    wrong = [] if variant in (None, config.name) else [f"architecture {said['architecture']}, not {config.name}"]
    otherwise = _prepared_otherwise(said) if config.in_chans == 3 else []
    if wrong or otherwise:
        file, asked = FILE if wrong else said["images_by"], "; ".join([*wrong, *otherwise])
        raise ConversionError(f"the {file} beside it asks for {asked}: such weights are not read here")
    changes = {
        key: said[key]
        for key in ("crop_pct", "global_pool", "crop_scale")
        if key in said and said[key] != getattr(config, key)
    }
    crop_pct = changes.get("crop_pct", config.crop_pct)
    if not isinstance(crop_pct, int | float) or not crop_pct > 0:
        raise ConversionError(f"the {FILE} beside it has a crop_pct of {crop_pct!r}: it must be a number above 0")
    notes = [f"{key} {value}, as the {FILE} beside it says" for key, value in changes.items()]
    try:
        config = config.replace(**changes)
    except (ValueError, TypeError) as error:
        raise ConversionError(f"the {FILE} beside it: {one_line(error)}") from None
    size = said.get("input_size", ())
    if size and list(size) != [config.in_chans, *config.image_size]:
        notes.append(f"the {FILE} beside it is for images {_shown(size)}; the weights' own size is taken")
    if class_names is None and said["label_names"]:
        class_names = _names(said["label_names"], config.num_classes)
        if class_names is None:
            notes.append(f"the label_names in the {FILE} beside it are not taken: they are not {config.num_classes}")
    return config, class_names, notes


def check_flags(flags: Any) -> None:
    """Looks at the flags of timm's training script in its checkpoints, for what they say of the images.

    Raises ConversionError where these were prepared otherwise than here.
    """
    # an empty value stands for what timm knows of the variant, which is ours
    said = {key: value for key in _PREPARED if (value := getattr(flags, key, None))}
    wrong = _prepared_otherwise(said) if getattr(flags, "in_chans", None) in (None, 3) else []
    if wrong:
        raise ConversionError(f"it was trained with {'; '.join(wrong)}: such weights are not read here")


def _prepared_otherwise(said: Mapping[str, Any]) -> list[str]:
    """Both values of what is said of images and is not done so here."""
    return [
        f"{key} {_shown(said[key])}, not {_shown(ours)}"
        for key, ours in _PREPARED.items()
        if key in said and not _is_same(said[key], ours)
    ]


def _variant(architecture: str) -> str | None:
    try:
        return get_config(architecture).name
    except ValueError:
        return None


def _is_same(theirs: Any, ours: Any) -> bool:
    try:
        return theirs == ours or [round(float(x), 4) for x in theirs] == [round(x, 4) for x in ours]
    except (TypeError, ValueError):
        return False


def _names(labels: Any, count: int) -> tuple[str, ...] | None:
    """Names in the order of the outputs, from a list or from a dict by index."""
    if isinstance(labels, dict):
        labels = [labels.get(str(index)) for index in range(max(count, len(labels)))]
    fits = isinstance(labels, list) and len(labels) == count and None not in labels
    return tuple(map(str, labels)) if fits else None


def _shown(value: Any) -> str:
    return f"({', '.join(map(str, value))})" if isinstance(value, list | tuple) else str(value)
