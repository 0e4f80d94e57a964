"""How much there is to see in a picture: the entropy of its grey levels."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from crossvit_jax.preprocess import UnreadableImage
from train.data.sources import Source
from train.devices.decoding import decoding_memory

_GREY = np.float32([0.299, 0.587, 0.114])  # ITU-R 601-2, Pillow's mode L
_PICTURES = 256  # that are looked at


def grey_entropy(pixels: UInt8[np.ndarray, "batch height width 3"]) -> Float[np.ndarray, " batch"]:
    """Shannon's entropy of each picture's 256 grey levels in bits, from 0 (one level) to 8.

    APT (arXiv 2510.18091) chooses patch sizes by it, patch by patch.
    """
    grey = np.rint(pixels.astype(np.float32) @ _GREY).astype(np.intp)
    entropies = np.empty(len(pixels))
    for place, picture in enumerate(grey):
        counts = np.bincount(picture.ravel(), minlength=256)
        shares = counts[counts > 0] / picture.size
        entropies[place] = -(shares * np.log2(shares)).sum()
    return np.abs(entropies)  # not -0


def parting_entropies(
    source: Source, transform: Callable[[Any], dict[str, Any]], parts: int
) -> tuple[float, ...] | None:
    """The grey levels' entropies that part pictures in equal shares, rising: one less than there are parts.

    Of some pictures, evenly spaced over the source; None if none of them can be read.

    Args:
        transform: that of evaluation: pictures are looked at as the model sees them.
    """
    found = []
    for index in np.unique(np.linspace(0, len(source) - 1, _PICTURES).round().astype(int)).tolist():
        try:
            with decoding_memory().returned():
                found.append(grey_entropy(transform(source[index])["image"][None])[0])
        except UnreadableImage:
            continue
    if not found:
        return None
    return tuple(round(float(x), 4) for x in np.quantile(found, np.arange(1, parts) / parts))
