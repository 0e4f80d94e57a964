"""The PyTorch twin with the linear layers that `python -m train.main --qat` rounds, rounded by torchao; and its file.

Both schemes are torchao's own. int8 is that of `--qat int8` (see `train.optim.quantize`): a scale for each output of
the weights, and for each token of what they multiply, the largest absolute value ÷ 127.5. int4 rounds weights as
`--qat int4` does, ÷ 7.5; but torchao fits the 8 bits of a token to its smallest and largest value, where qwix keeps
zero in the middle.
"""

import importlib.util
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float32

from convert import metadata
from convert.errors import ConversionError, one_line, quiet
from convert.export.calibration import DIGITS, calibration_images, find_images
from convert.export.int8 import (
    BOUND,
    COMPARED,
    Difference,
    check_weights,
    difference_of,
    photographs_to_compare,
    run_source,
)
from convert.files import check_place, replacing, typed_path, write_bytes
from convert.formats.torch_files import load_plain
from convert.models import torch_model
from convert.weights import Weights
from crossvit_jax.config import CrossViTConfig
from crossvit_jax.preprocess import MEAN, STD

if TYPE_CHECKING:
    import torch

    import crossvit_torch

Scheme = Literal["int8", "int4"]

ENDING = ".pt"
FORMAT = 1

# of the root mean square difference, relative to the spread of the source's logits
BOUNDS: dict[str, float] = {"int8": BOUND, "int4": 0.3}

_BATCH = 7  # the last batch has another size
_WEIGHTS = "quantized"  # no name under which readers of checkpoints look for weights


@dataclass(frozen=True, kw_only=True)
class TorchaoFile:
    """What such a file holds."""

    config: CrossViTConfig
    class_names: tuple[str, ...] | None  # in the order of the logits
    scheme: Scheme
    tensors: "Mapping[str, torch.Tensor]"  # the state dict of the quantised twin


def check_torchao(destination: str | Path, *, compare: str | None = None, overwrite: bool = False) -> Path:
    """The destination as a path, before any work is done for it.

    Args:
        compare: see `export_torchao`.

    Raises:
        ConversionError: torchao is not installed; the ending is not `.pt`; the folder is missing, or something is there
            that may not be replaced; or there are no images to compare on.
    """
    path = typed_path(destination)
    if path.suffix != ENDING:
        raise ConversionError(f"{path}: unknown ending {path.suffix!r}; models quantised by torchao are {ENDING} files")
    _require_torchao(path)
    check_place(path, overwrite=overwrite)
    if compare is not None:
        find_images(compare)
    return path


def export_torchao(
    weights: Weights,
    destination: str | Path,
    scheme: Scheme = "int8",
    *,
    compare: str | None = None,
    overwrite: bool = False,
) -> tuple[Path, Difference]:
    """Writes a quantised twin, reads it again, and runs that against the twin in float32; `load_torchao` reads it too.

    The file is written under a temporary name and only kept if they agree.

    Args:
        weights: in float32.
        compare: on which images: `digits`, or a folder; None: photographs.

    Returns:
        The path, and how far the file is from its source; nothing was written if that has not `passed`.

    Raises:
        ConversionError: see `check_torchao` and `check_weights`; an image cannot be read; or writing fails.
    """
    path = check_torchao(destination, compare=compare, overwrite=overwrite)
    check_weights(weights)
    images, named = _images(weights.config, compare)
    with replacing(path) as new:
        _save(quantised_twin(weights, scheme), weights, scheme, new)
        expected, got = run_source(weights, images), _run(load_torchao(new), images)
        difference = difference_of(expected, got, named, bound=BOUNDS[scheme])
        if not difference.passed:
            new.unlink()
    return path, difference


def quantised_twin(weights: Weights, scheme: Scheme) -> "crossvit_torch.CrossViT":
    """The twin with these weights, its linear layers quantised, in evaluation mode.

    Args:
        weights: in float32.
    """
    with quiet("torch.utils._pytree"):  # torch tells the user that torchao registers enums
        from torchao.quantization import quantize_
    model = torch_model(weights)
    quantize_(model, _config(scheme), is_quantised)
    return model.requires_grad_(False)


def is_quantised(module: "torch.nn.Module", path: str) -> bool:
    """Whether `--qat` rounds what a module of the twin at this path multiplies.

    Those are the linear layers of the transformer, without the key and value projections of cross-attention: these fold
    into the scores and sums in Flax. The heads stay as they are.
    """
    import torch

    name = path.split(".")
    return isinstance(module, torch.nn.Linear) and name[0] == "blocks" and name[-1] not in ("wk", "wv")


def load_torchao(path: str | Path) -> "crossvit_torch.CrossViT":
    """The quantised twin in a file of `export_torchao`, in evaluation mode: its logits are those of the model written.

    Its `config` tells image size and classes; `read_torchao` also tells the names of these.

    Raises:
        ConversionError: see `read_torchao`.
    """
    import crossvit_torch

    stored = read_torchao(path)
    model = crossvit_torch.CrossViT(stored.config, device="meta")
    try:
        # assigned, not copied: what is there has neither memory nor integers
        model.load_state_dict(stored.tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise ConversionError(f"{path} holds other tensors than its model has: {one_line(error)}") from None
    return model.eval().requires_grad_(False)


def read_torchao(path: str | Path) -> TorchaoFile:
    """What is in a file of `export_torchao`, of which nothing is run.

    Raises:
        ConversionError: torchao is not installed; there is no such file, it is damaged or of a newer format, or it is
            another file.
    """
    path = typed_path(path)
    _require_torchao(path)
    with quiet("torch.utils._pytree"):
        import torchao.quantization  # noqa: F401 (tells torch that its classes are safe to load)
    if not path.is_file():
        raise ConversionError(f"{path} {'is no file' if path.exists() else 'does not exist'}")
    stored = load_plain(path)
    if not isinstance(stored, Mapping) or _WEIGHTS not in stored or metadata.KEY not in stored:
        raise ConversionError(f"{path} is no model that python -m convert.torchao wrote")
    if stored["format"] > FORMAT:
        raise ConversionError(f"{path} was written by a newer version (format {stored['format']})")
    try:
        config, class_names = metadata.understand(stored[metadata.KEY])
    except ConversionError as error:
        raise ConversionError(f"{path}: {error}") from None
    return TorchaoFile(config=config, class_names=class_names, scheme=stored["quantize"], tensors=stored[_WEIGHTS])


def _require_torchao(path: Path) -> None:
    if importlib.util.find_spec("torchao") is None:
        raise ConversionError(f"{path} needs torchao: pip install 'crossvit-jax[torchao]'")


def _config(scheme: Scheme) -> Any:
    """How torchao calls the scheme."""
    import torch
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8DynamicActivationIntxWeightConfig
    from torchao.quantization.granularity import PerAxis

    if scheme == "int8":
        # settings of the compiler belong to the program that compiles
        return Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    return Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerAxis(0))


def _save(model: "crossvit_torch.CrossViT", weights: Weights, scheme: Scheme, path: Path) -> None:
    """Plain values and tensors, as `torch.load(weights_only=True)` wants it."""
    import torch

    config = weights.config
    content = {
        "format": FORMAT,
        "quantize": scheme,
        "variant": config.name,
        "image_size": config.image_size,
        "num_classes": config.num_classes,
        "class_names": weights.class_names and list(weights.class_names),
        "input": "normalised float32 images (batch, channels, height, width) of image_size",
        "crop_pct": config.crop_pct,
        "license": weights.license,
        "library": f"crossvit-jax {metadata.version('crossvit-jax')}",
        "torchao": metadata.version("torchao"),
        metadata.KEY: metadata.to_json(config, weights.class_names),
        _WEIGHTS: model.state_dict(),
    }
    if config.in_chans == 3:
        content |= {"mean": MEAN, "std": STD}
    buffer = io.BytesIO()  # torch's own file writer reports a full disk as an internal assertion
    torch.save(content, buffer)
    write_bytes(path, buffer.getbuffer())


def _images(
    config: CrossViTConfig, compare: str | None
) -> tuple[Float32[np.ndarray, "images channels height width"], str]:
    """Those to compare on, and what they are."""
    if compare is None:
        return photographs_to_compare(config)
    images = calibration_images(compare, config, COMPARED)
    return images, f"{len(images)} digits" if compare == DIGITS else f"{len(images)} images of {compare}"


def _run(
    model: "crossvit_torch.CrossViT", images: Float32[np.ndarray, "images channels height width"]
) -> Float32[np.ndarray, "images out"]:
    import torch

    with torch.inference_mode():
        return torch.cat([model(batch) for batch in torch.from_numpy(images).split(_BATCH)]).numpy()
