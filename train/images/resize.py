"""Pillow's bicubic resizing, by what is fastest in all: Pillow for tiny images, our own code for the others."""

from collections.abc import Callable
from functools import cache

import numpy as np
from jaxtyping import UInt8

from crossvit_jax import preprocess

_TINY = 32 * 32  # pixels: the digits, MNIST, CIFAR


def resize(
    pixels: UInt8[np.ndarray, "height width 3"], size: tuple[int, int]
) -> UInt8[np.ndarray, "out_height out_width 3"]:
    """The pixels of `crossvit_jax.preprocess.resize`, for a size (height, width).

    For tiny images Pillow takes half a millisecond at most, and `train.images.resample` half a second to import.
    """
    height, width, _ = pixels.shape
    return (preprocess.resize if height * width <= _TINY else _resize_large())(pixels, size)


@cache
def _resize_large() -> Callable[..., np.ndarray]:
    """Our own code, or where numba is not installed Pillow, whose pixels are the same."""
    try:
        from train.images import resample
    except ModuleNotFoundError as error:
        if error.name != "numba":
            raise
        return preprocess.resize
    return resample.resize
