"""RandAugment's operations as timm and Pillow do them, with the magnitudes that the device draws."""

import math
from unittest import mock

from PIL import Image
from timm.data import auto_augment

from train.images.augment import FINENESS
from train.images.pillow_ops import FILL, ONE, PIXEL

_INCREASING = ("Color", "Contrast", "Brightness", "Sharpness", "Posterize", "Solarize")  # those that timm has twice
_IN_UNITS = ("ShearX", "ShearY", "Color", "Contrast", "Brightness", "Sharpness")


def by_timm(image: Image.Image, operation: str, level: int, *, negative: bool, increasing: bool = True) -> Image.Image:
    """An operation done to an image.

    What timm derives from the magnitude is rounded to the unit that the device computes in: factors to 1 / `ONE`,
    shifts to 1 / `PIXEL`.
    """
    name = operation + "Increasing" * (increasing and operation in _INCREASING)
    to_arguments = auto_augment.LEVEL_TO_ARG[name]
    with mock.patch.object(auto_augment, "_randomly_negate", lambda value: -value if negative else value):
        arguments = () if to_arguments is None else to_arguments(level / FINENESS, {"translate_pct": 0.45})
    if operation in _IN_UNITS:
        arguments = (round(arguments[0] * ONE) / ONE,)
    elif operation.startswith("Translate"):
        pixels = arguments[0] * image.size["XY".index(operation[9])]
        name = f"Translate{operation[9]}"  # in pixels; halves of a unit go up, also those that floats fall short of
        arguments = (math.floor(pixels * PIXEL + 0.5 + 1e-6) / PIXEL,)
        assert abs(arguments[0] - pixels) < 1 / PIXEL
    return auto_augment.NAME_TO_OP[name](image, *arguments, fillcolor=FILL, resample=Image.Resampling.BICUBIC)
