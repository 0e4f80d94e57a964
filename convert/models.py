"""Ready models and weights from any source, and parameters to any destination."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from convert import architecture, metadata
from convert.changes.dense import adapt_to_task
from convert.errors import ConversionError, require
from convert.formats import timm_config
from convert.formats.read import read
from convert.formats.write import write
from convert.tensors import as_tensor
from convert.tree import flatten, from_state_dict, nest, shapes_of
from convert.weights import Weights
from crossvit_jax import CrossViT
from crossvit_jax.config import TIMM_NAMES, CrossViTConfig, DenseConfig, DetectorConfig, SegmenterConfig, get_config
from crossvit_jax.preprocess import Exif

if TYPE_CHECKING:
    import torch

    import crossvit_torch
    from crossvit_jax import CrossViTDetector, CrossViTSegmenter

_log = logging.getLogger(__name__)


def to_flax(state_dict: Mapping[str, Any], config: CrossViTConfig | DenseConfig | None = None) -> dict[str | int, Any]:
    """A state dict as the nested parameters of the Flax model, a detector and a segmenter too, bit for bit.

    Args:
        state_dict: torch tensors or arrays under timm's or IBM's names; `module.` prefixes are dropped.
        config: the model it must fit; default: the one that its shapes tell.

    Returns:
        What `nnx.to_pure_dict(nnx.state(model, nnx.Param))` returns: nested dicts with int keys for list indices. The
        leaves are numpy arrays (bfloat16 is ml_dtypes'), views of the tensors' memory in the tensors' dtype.

    Raises:
        ConversionError: tensors are missing, unexpected or mis-shaped, all of them named, or are no weights.
    """
    tensors = from_state_dict(state_dict)
    shapes = shapes_of(tensors)
    architecture.check(shapes, config or architecture.infer_config(shapes), "the state dict")
    return nest(tensors)


def to_torch(params: Any) -> "dict[str, torch.Tensor]":
    """Flax parameters as a state dict with timm's names and layouts, bit for bit: the inverse of `to_flax`.

    Args:
        params: nested parameters, an `nnx.State` or a model.

    Returns:
        Torch tensors on the CPU, in the parameters' dtypes. Those of writable numpy arrays are views of their memory.
        jax arrays are copied, since torch might write to them.

    Raises:
        ConversionError: a leaf is no array of weights.
    """
    return {name: as_tensor(array) for name, array in flatten(params).items()}


def load_weights(source: str | Path, *, task: str | None = None, seed: int = 0, **overrides: Any) -> Weights:
    """The weights in a source with their settings, checked and adapted, in the stored dtype.

    Args:
        source: `hf-hub:owner/repo`, a `.safetensors`, `.pth` or `.bin` file, an Orbax folder, or a run's folder, also
            with `:last` or `:ema`.
        task: "classification", "detection" or "segmentation"; default: that of the source. For another, a new model is
            made around the source's body, see `convert.changes.dense.adapt_to_task`; it needs `num_classes`.
        seed: of a new head, or whatever else is new.
        **overrides: settings (`image_size`, `patch_size`, …), see `convert.changes.adapt.adapt`, and for detectors and
            segmenters `DetectorConfig` and `SegmenterConfig`. Of a model that is no variant, `branches` have to be
            given where the source has no metadata; where it has, they may only be the same.

    Raises:
        ConversionError: the source cannot be read, holds no complete CrossViT, or cannot be adapted.
        TypeError: an override is no setting.
    """
    stored = read(source)
    shapes = shapes_of(stored.tensors)
    try:
        if stored.description is not None:
            config, class_names = metadata.understand(stored.description)
            exif = metadata.recorded_exif(stored.description)
            patch_sizes = metadata.recorded_patch_sizes(stored.description)
            entropies = metadata.recorded_entropies(stored.description)
        else:
            size = overrides.get("image_size")
            size = (size, size) if isinstance(size, int) else size
            config, class_names = architecture.infer_config(shapes, size, overrides.get("branches")), None
            exif = patch_sizes = entropies = None
        said = ()
        if stored.said is not None:
            config, class_names, said = timm_config.honour(config, class_names, stored.said)
    except ConversionError as error:
        raise ConversionError(f"{source}: {error}") from None
    architecture.check(shapes, config, str(source))
    known = {"config": config, "class_names": class_names, "exif": exif}
    known |= {"patch_sizes": patch_sizes, "entropies": entropies}
    known |= {"origin": stored.origin, "trained": stored.trained, "curves": stored.curves}
    weights = Weights(tensors=stored.tensors, notes=(*stored.notes, *said), **known)
    return adapt_to_task(weights, task, overrides, seed=seed)


def list_pretrained() -> dict[str, str]:
    """The weights that timm publishes, trained on ImageNet-1k: each variant's short name and its source on the hub."""
    return {name: f"hf-hub:timm/{timm_name}.in1k" for name, timm_name in TIMM_NAMES.items()}


def load_flax(
    source: str | Path,
    *,
    pretrained: bool = False,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    task: str | None = None,
    seed: int = 0,
    **overrides: Any,
) -> "CrossViT | CrossViTDetector | CrossViTSegmenter":
    """The Flax model with the weights of a source, in evaluation mode. Changes and oddities are logged as warnings.

    Its `class_names` are those of the outputs, in their order; None where the source does not know them.

    Args:
        source, task, seed, overrides: see `load_weights`.
        pretrained: the source is a variant's name, whose published weights are meant, see `list_pretrained`.
        dtype, param_dtype: see `crossvit_jax.CrossViT`. Parameters become float32 unless told otherwise, whatever the
            file holds; float64 needs `jax_enable_x64`.

    Raises:
        ConversionError, TypeError: see `load_weights`.
    """
    weights = _load_aloud(_published(source) if pretrained else source, task, seed, overrides)
    model = flax_model(weights, dtype=dtype, param_dtype=param_dtype)
    model.class_names = weights.class_names
    return model


def flax_model(weights: Weights, *, dtype: Any = None, param_dtype: Any = jnp.float32) -> nnx.Module:
    """The Flax model with these weights, in evaluation mode; no initial weights are drawn."""
    graphdef, _ = architecture.abstract_model(weights.config, dtype, param_dtype)
    # jnp.array copies: on a CPU, jnp.asarray may share memory with tensors that belong to others
    params = jax.tree.map(lambda leaf: jnp.array(leaf, param_dtype), nest(weights.tensors))
    model = nnx.merge(graphdef, params)
    model.eval()
    return model


def load_torch(
    source: str | Path,
    *,
    pretrained: bool = False,
    dtype: "torch.dtype | None" = None,
    param_dtype: "torch.dtype | None" = None,
    device: Any = None,
    task: str | None = None,
    seed: int = 0,
    **overrides: Any,
) -> "crossvit_torch.CrossViT | CrossViTDetector | CrossViTSegmenter":
    """The PyTorch twin with the weights of a source, in evaluation mode. Changes and oddities are logged as warnings.

    Its `class_names` are as in `load_flax`.

    Args:
        source, task, seed, overrides: see `load_weights`.
        pretrained: as in `load_flax`.
        dtype, param_dtype, device: see `crossvit_torch.CrossViT`; parameters become float32 unless told otherwise.

    Raises:
        ConversionError, TypeError: see `load_weights`.
        MissingExtra: torch is not installed.
    """
    require("load_torch", "torch")
    weights = _load_aloud(_published(source) if pretrained else source, task, seed, overrides)
    model = torch_model(weights, dtype=dtype, param_dtype=param_dtype, device=device)
    model.class_names = weights.class_names
    return model


def torch_model(
    weights: Weights,
    *,
    dtype: "torch.dtype | None" = None,
    param_dtype: "torch.dtype | None" = None,
    device: Any = None,
) -> "torch.nn.Module":
    """The PyTorch twin with these weights, in evaluation mode; no initial weights are drawn.

    Raises MissingExtra where torch is not installed.
    """
    require("the PyTorch twin", "torch")
    import torch

    import crossvit_torch

    param_dtype = param_dtype or torch.float32
    classes = {DetectorConfig: crossvit_torch.CrossViTDetector, SegmenterConfig: crossvit_torch.CrossViTSegmenter}
    build = classes.get(type(weights.config), crossvit_torch.CrossViT)
    model = build(weights.config, dtype=dtype, param_dtype=param_dtype, device="meta")
    # copies: the parameters are laid out as in a fresh model, and share no memory
    own = {"device": device or "cpu", "dtype": param_dtype, "copy": True, "memory_format": torch.contiguous_format}
    state = {name: as_tensor(array).to(**own) for name, array in weights.tensors.items()}
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def save(
    params: Any,
    config: CrossViTConfig | DenseConfig,
    destination: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    exif: Exif | None = None,
    patch_sizes: tuple[tuple[int, ...], ...] | None = None,
    entropies: tuple[float, ...] | None = None,
    origin: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes parameters in the format that the destination's ending names, see `convert.formats.write.write`.

    Args:
        params: nested Flax parameters, an `nnx.State` or a model, or a flat state dict.
        config: of the model; it travels as metadata.
        class_names: in the order of the logits; they travel as metadata.
        exif: whether training turned images as EXIF says (`crossvit_jax.preprocess.decode_image`); metadata as well.
        patch_sizes: those that training drew from, where there were several; metadata as well.
        entropies: of grey levels in bits, rising, that part the training pictures evenly among these; metadata as well.
        origin: where they come from, in words; a note for those who read a .safetensors file.
        overwrite: replace what is there.

    Returns:
        The path written.

    Raises:
        ConversionError: the parameters are not this model's, or the destination cannot be written.
    """
    is_nested = not isinstance(params, Mapping) or any(isinstance(value, Mapping) for value in params.values())
    tensors = flatten(params) if is_nested else from_state_dict(params)
    architecture.check(shapes_of(tensors), config, "the model")
    names = None if class_names is None else tuple(class_names)
    if names is not None and len(names) != config.num_classes:
        raise ConversionError(f"{len(names)} class names for {config.num_classes} classes")
    known = {"class_names": names, "exif": exif, "patch_sizes": patch_sizes, "entropies": entropies}
    weights = Weights(config=config, tensors=tensors, origin=origin, **known)
    return write(weights, destination, overwrite=overwrite)


def _published(variant: str | Path) -> str:
    """The source of a variant's published weights. Raises ConversionError for any other name."""
    try:
        return list_pretrained()[get_config(str(variant)).name]
    except (ValueError, KeyError):
        known = ", ".join(TIMM_NAMES)
        raise ConversionError(f"pretrained weights are those of a variant ({known}), not of {variant}") from None


def _load_aloud(source: str | Path, task: str | None, seed: int, overrides: Mapping[str, Any]) -> Weights:
    weights = load_weights(source, task=task, seed=seed, **overrides)
    for note in filter(None, (*weights.notes, weights.non_finite())):
        _log.warning("%s: %s", source, note)
    return weights
