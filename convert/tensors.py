"""Torch tensors, jax arrays and numpy arrays into one another, bit for bit and without copies where that is safe."""

import sys
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from convert.errors import ConversionError, require

if TYPE_CHECKING:
    import torch

MOST_AXES = 8
MOST_TENSORS = 50_000  # in a file: of the largest model's training state there are a tenth
DTYPES = {np.dtype(t).name: np.dtype(t) for t in (np.float32, np.float16, ml_dtypes.bfloat16, np.float64)}


def as_array(value: Any, name: str) -> np.ndarray:
    """A torch tensor, jax array or numpy array as a numpy array; shares memory with tensors on the CPU.

    Raises:
        ConversionError: it is none of these, or not a dense tensor of float16, bfloat16, float32 or float64.
    """
    torch = sys.modules.get("torch")  # where nothing has imported torch, nothing is a tensor of it
    if torch is not None and isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.is_meta or value.is_quantized:
            raise ConversionError(f"{name} is no plain tensor ({value.layout}, {value.dtype}, {value.device})")
        if value.ndim > MOST_AXES:
            raise ConversionError(f"{name} has {value.ndim} axes; weights have {MOST_AXES} at most")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():  # as of `expand`: stride 0
            raise ConversionError(f"{name} has {value.numel():,} elements that share memory: save a copy of it")
        value = value.detach().cpu().resolve_conj().resolve_neg()
        if value.dtype == torch.bfloat16:  # numpy has none of its own
            return value.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        dtype = str(value.dtype).removeprefix("torch.")
        array = value.numpy() if dtype in DTYPES else None
    elif hasattr(value, "shape") and hasattr(value, "dtype"):
        array, dtype = np.asarray(value), str(value.dtype)
    else:
        raise ConversionError(f"{name} is no tensor but a {type(value).__name__}")
    if dtype not in DTYPES:
        raise ConversionError(f"{name} has dtype {dtype}; weights can have {', '.join(DTYPES)}")
    return array


def as_tensor(array: np.ndarray) -> "torch.Tensor":
    """A numpy array as a torch tensor of the same dtype; shares memory where the array may be written to.

    Raises MissingExtra where torch is not installed.
    """
    require("a torch tensor", "torch")
    import torch

    if not array.flags.writeable:  # jax's arrays: torch would change them behind JAX's back
        array = array.copy()
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)
