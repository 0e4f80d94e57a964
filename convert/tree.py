"""timm's flat names to Flax's nested parameters and back.

Every parameter has the same path in both, so there is no table of layers: three leaf rules (convolution kernel
OIHW ↔ HWIO, linear kernel transposed, norm weight ↔ scale), told apart by name and rank, and the rest stays as it is.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from flax import nnx

from convert.errors import ConversionError
from convert.tensors import as_array

# (timm's leaf, rank) -> (Flax's leaf, timm's axes in Flax's order)
_TO_FLAX = {("weight", 4): ("kernel", (2, 3, 1, 0)), ("weight", 2): ("kernel", (1, 0)), ("weight", 1): ("scale", (0,))}
# (Flax's leaf, rank) -> (timm's leaf, Flax's axes in timm's order)
_TO_TIMM = {("kernel", 4): ("weight", (3, 2, 0, 1)), ("kernel", 2): ("weight", (1, 0)), ("scale", 1): ("weight", (0,))}
_WRAPPERS = re.compile(r"(^|\.)(?:(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+")


def nest(tensors: Mapping[str, np.ndarray]) -> dict[str | int, Any]:
    """timm's names and layouts as Flax parameters: nested dicts with int keys for list indices. Views, no copies."""
    tree: dict[str | int, Any] = {}
    for path, array in to_flax_paths(tensors).items():
        *parents, leaf = path.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(int(key) if key.isdigit() else key, {})
        node[leaf] = array
    return tree


def flatten(params: Any) -> dict[str, np.ndarray]:
    """Flax parameters (nested dicts, an `nnx.State` or a model) as timm's names and layouts. Views, no copies."""
    if isinstance(params, nnx.Module):
        params = nnx.state(params, nnx.Param)
    if isinstance(params, nnx.State):
        params = nnx.to_pure_dict(params)
    return from_flax_paths({path: as_array(leaf, path) for path, leaf in leaves(params)})


def to_flax_paths(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """timm's names and layouts as Flax's dotted paths and layouts. Views, no copies."""
    return _renamed(tensors, _TO_FLAX)


def from_flax_paths(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Flax's dotted paths and layouts as timm's names and layouts. Views, no copies."""
    return _renamed(arrays, _TO_TIMM)


def timm_shape(path: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """timm's name and shape of the Flax parameter at a dotted path."""
    name, axes = _rename(path, len(shape), _TO_TIMM)
    return name, tuple(shape[axis] for axis in axes)


def from_state_dict(state_dict: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A state dict under timm's, IBM's or wrapped names as arrays under timm's names. Views, no copies.

    Raises:
        ConversionError: an entry is no tensor of weights, or two names mean the same parameter.
    """
    tensors: dict[str, np.ndarray] = {}
    for key, value in state_dict.items():
        # IBM keeps tokens and embeddings in lists
        name = re.sub(r"^(pos_embed|cls_token)\.(\d+)$", r"\1_\2", without_wrappers(str(key)))
        if name in tensors:
            raise ConversionError(f"{key} is one name too many for {name}")
        tensors[name] = as_array(value, str(key))
    return tensors


def without_wrappers(name: str) -> str:
    """A name without what torch.compile, DataParallel, FSDP and checkpointing put into it, around any module."""
    return _WRAPPERS.sub(r"\1", name)


def shapes_of(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def leaves(tree: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted path and value of every leaf of nested dicts."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _renamed(arrays: Mapping[str, np.ndarray], rules: Mapping) -> dict[str, np.ndarray]:
    paths = [_rename(path, array.ndim, rules) for path, array in arrays.items()]
    return {path: array.transpose(axes) for (path, axes), array in zip(paths, arrays.values(), strict=True)}


def _rename(path: str, rank: int, rules: Mapping) -> tuple[str, tuple[int, ...]]:
    """The other side's path, and this side's axes in the other side's order."""
    parent, dot, leaf = path.rpartition(".")
    leaf, axes = rules.get((leaf, rank), (leaf, tuple(range(rank))))
    return parent + dot + leaf, axes
