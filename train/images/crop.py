"""What is left to workers where the device augments: an image decoded, a random part of it cut out and resized."""

import math
import random
from dataclasses import dataclass
from typing import Any

import numpy as np

from train.images.decode import decode_pixels
from train.images.resize import resize

_TRIES = 10  # boxes drawn until one fits; after that, the largest in the middle


@dataclass(frozen=True)
class CropTransform:
    """The first step of timm's training transform, its `RandomResizedCropAndInterpolation`, bicubic.

    Called with a sample (`image`: encoded bytes, `label`, `name`) and the sample's generator. Raises UnreadableImage
    before it has drawn anything. Needs neither timm nor torch, so that workers start sooner.
    """

    image_size: tuple[int, int]
    scale: tuple[float, float]
    ratio: tuple[float, float]

    def __call__(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        pixels = decode_pixels(sample["image"], sample["name"])
        top, left, height, width = draw_crop(rng, pixels.shape[:2], self.scale, self.ratio)
        crop = resize(pixels[top : top + height, left : left + width], self.image_size)
        return {"image": crop, "label": np.int32(sample["label"])}


def draw_crop(
    rng: np.random.Generator | random.Random,
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random part of an image of a size (height, width): timm's `get_params`.

    Args:
        rng: numpy's, or Python's, from which timm draws: then the part is timm's own, but where that has no pixel.
        scale: smallest and largest area, as share of the image.
        ratio: smallest and largest width / height.
    """
    height, width = size
    integer = rng.randrange if isinstance(rng, random.Random) else rng.integers
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_TRIES):
        area = rng.uniform(*scale) * (height * width)
        aspect = math.exp(rng.uniform(*log_ratio))
        # of an image of few pixels a small share is none, which timm cannot resize
        crop_width, crop_height = max(1, round(math.sqrt(area * aspect))), max(1, round(math.sqrt(area / aspect)))
        if crop_width <= width and crop_height <= height:
            top = integer(height - crop_height + 1)
            left = integer(width - crop_width + 1)
            return int(top), int(left), crop_height, crop_width
    aspect = min(max(width / height, ratio[0]), ratio[1])
    crop_width, crop_height = min(width, round(height * aspect)), min(height, round(width / aspect))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width
