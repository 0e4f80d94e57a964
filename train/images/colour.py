"""Colour jitter on the host: torchvision's `ColorJitter` without its hue, as timm uses it, with the draws apart."""

from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance

_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


class ColourJitter(NamedTuple):
    """Factors on brightness, contrast and saturation; 1 changes nothing."""

    factors: tuple[float, float, float]
    order: tuple[int, int, int]  # in which they are applied: places in `factors`


def draw_colour(rng: np.random.Generator, strength: float) -> ColourJitter:
    """Factors between 1 - `strength`, or 0, and 1 + `strength`, in any order."""
    factors = rng.uniform(max(0.0, 1 - strength), 1 + strength, size=3)
    return ColourJitter(tuple(factors.tolist()), tuple(rng.permutation(3).tolist()))


def jitter_colour(
    pixels: UInt8[np.ndarray, "height width 3"], jitter: ColourJitter
) -> UInt8[np.ndarray, "rows cols 3"]:
    """The pixels of torchvision.transforms.v2's `adjust_brightness`, `adjust_contrast` and `adjust_saturation` for an
    image of Pillow's."""
    image = Image.fromarray(pixels)
    for place in jitter.order:
        image = _ENHANCERS[place](image).enhance(jitter.factors[place])
    return np.array(image)  # not read-only, which resizing would not take
