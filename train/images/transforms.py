"""From an encoded image to the model's input: timm's transforms, made to draw from a generator of ours.

timm draws from the global generators of Python, numpy and torch. For each image they are set from the sample's own
generator, so that its pixels depend on nothing else. What can be done faster with the same pixels is done here:
decoding, crops and their resizing, and the way to normalised values. Flips, RandAugment and random erasing are timm's
own. Importing it takes seconds: it happens on first use, in the process that uses it, and where a recipe has none of
these steps, never.
"""

import math
import random
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, UInt8
from PIL import Image, ImageOps

from convert.errors import require
from crossvit_jax.config import CrossViTConfig
from crossvit_jax.preprocess import Exif, evaluation_crop, normalised
from train.config import TrainConfig
from train.images.decode import decode_pixels
from train.images.resize import resize

_TRIES = 10  # boxes drawn until one fits; after that, the largest in the middle

# Held while timm draws for one image: it uses global generators, which reader threads share. Reading and decoding need
# no generator and happen without it.
_generators_lock = threading.Lock()

# Held while timm is imported: its modules import each other in a circle, so that two threads that import it at the same
# time can fail.
_import_lock = threading.Lock()


@contextmanager
def _timm_drawing_from(draws: random.Random, numpy_seed: int, torch_seed: int) -> Iterator[None]:
    """Whatever timm and torchvision draw in here follows from these alone."""
    data = _timm_data()
    import torch

    with _generators_lock:
        # other threads may use Python's generator at any time (wandb, beartype), so timm gets one that nobody shares
        data.auto_augment.random = data.random_erasing.random = draws
        np.random.seed(numpy_seed)
        torch.default_generator.manual_seed(torch_seed)  # torch.manual_seed would also visit every accelerator
        try:
            yield
        finally:
            data.auto_augment.random = data.random_erasing.random = random


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep the highest bits of each value, at most 4 in timm. Of 0 bits, which Pillow 13 refuses, black remains."""
    return ImageOps.posterize(image, bits) if bits else Image.new(image.mode, image.size)


@cache
def _timm_data():
    """timm.data. torch's tensor operations, all tiny here, keep off the other cores: those are for workers and jax."""
    with _import_lock:
        import torch
        from timm import data
    torch.set_num_threads(1)
    return data


def timm_settings(config: TrainConfig) -> dict[str, Any]:
    """How timm's `create_transform` and `create_loader` name what is done to the training images of a run."""
    return {
        "is_training": True,
        "scale": config.crop_scale,
        "ratio": config.crop_ratio,
        "hflip": config.hflip,
        "vflip": config.vflip,
        "color_jitter": config.color_jitter or None,
        "auto_augment": config.auto_augment or None,
        "interpolation": "bicubic",
        "re_prob": config.erase_prob,
        "re_mode": "pixel",
    }


def require_timm(config: TrainConfig, *, may_augment_elsewhere: bool) -> None:
    """Raises MissingExtra if the host is to do to the images of a run what timm does, and timm is not installed.

    Args:
        may_augment_elsewhere: whether the device could do it instead.
    """
    steps = _timms_steps(config)
    if steps and config.augment_on == "host" and config.task in ("classification", "pretraining"):
        otherwise = "--augment-on device" * may_augment_elsewhere
        require(f"{', '.join(steps)} on the host", "timm", "torch", otherwise=otherwise, verb="need")


def _timms_steps(config: TrainConfig) -> list[str]:
    """What is asked for that timm's code does, in words."""
    asked = {"flips": config.hflip or config.vflip, "auto_augment": config.auto_augment}
    asked |= {"colour jitter": config.color_jitter, "random erasing": config.erase_prob}
    return [name for name, value in asked.items() if value]


@dataclass(frozen=True)
class TrainTransform:
    """timm's training transform: random crop, flips, RandAugment, colour jitter, normalisation, random erasing.

    Called with a sample (`image`: encoded bytes, `label`, `name`) and the sample's generator. Raises UnreadableImage
    before it has drawn anything.
    """

    config: TrainConfig
    image_size: tuple[int, int]

    @cached_property
    def timm_transform(self):
        """A torchvision `Compose`. Raises whatever timm does for an `auto_augment` that it does not understand."""
        data = _timm_data()
        # magnitude 9 with its noise asks for 0 bits about once in 660 images
        operations = data.auto_augment.NAME_TO_OP
        operations["Posterize"] = operations["PosterizeIncreasing"] = _posterize
        settings = timm_settings(self.config)
        del settings["is_training"]
        # create_transform would leave out the colour jitter beside RandAugment
        make = data.transforms_factory.transforms_imagenet_train
        return make(self.image_size, **settings, force_color_jitter=True)

    @cached_property
    def _steps(self):
        """timm's steps on the cropped image, and on its normalised values."""
        if not _timms_steps(self.config):
            return (), ()
        _, *steps = self.timm_transform.transforms
        tensor = _timm_data().transforms.MaybeToTensor
        (end,) = (place for place, step in enumerate(steps) if isinstance(step, tensor))
        return steps[:end], steps[end + 2 :]  # after normalisation

    def __call__(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        pixels = decode_pixels(sample["image"], sample["name"], self.config.exif)
        return {"image": self.augmented(pixels, rng), "label": np.int32(sample["label"])}

    def augmented(
        self, pixels: UInt8[np.ndarray, "height width 3"], rng: np.random.Generator
    ) -> Float32[np.ndarray, "rows columns 3"]:
        """A crop of decoded pixels, changed and normalised."""
        python_seed, *seeds = (int(seed) for seed in rng.integers(0, 2**32, size=3))
        draws = random.Random(python_seed)
        top, left, height, width = draw_crop(draws, pixels.shape[:2], self.config.crop_scale, self.config.crop_ratio)
        crop = resize(pixels[top : top + height, left : left + width], self.image_size)
        on_image, on_values = self._steps
        with _timm_drawing_from(draws, *seeds) if on_image or on_values else nullcontext():
            if on_image:
                image = Image.fromarray(crop)
                for step in on_image:
                    image = step(image)
                crop = np.asarray(image)
            values = normalised(crop)
            if on_values:
                import torch

                for step in on_values:
                    step(torch.from_numpy(values).permute(2, 0, 1))  # in place
        return values


@dataclass(frozen=True)
class MultiCrop:
    """Several crops of an image, each drawn and changed by itself: `image` (2, height, width, 3), large ones, and, if
    there are any, `small` (count, height, width, 3); float32, normalised.

    Called as `TrainTransform`; labels are not needed.
    """

    large: TrainTransform
    small: TrainTransform
    count: int

    def __call__(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        pixels = decode_pixels(sample["image"], sample["name"], self.large.config.exif)
        crops = {"image": np.stack([self.large.augmented(pixels, rng) for _ in range(2)])}
        if self.count:
            crops["small"] = np.stack([self.small.augmented(pixels, rng) for _ in range(self.count)])
        return crops


@dataclass(frozen=True)
class EvalTransform:
    """timm's evaluation transform before it normalises: the pixels of `crossvit_jax.preprocess_image`, made faster.

    Called with a sample (`image`: encoded bytes, `label`, `name`). Raises UnreadableImage.
    """

    image_size: tuple[int, int]
    crop_pct: float
    exif: Exif = "keep"

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        pixels = decode_pixels(sample["image"], sample["name"], self.exif)
        return {"image": self.seen_pixels(pixels), "label": np.int32(sample["label"])}

    def seen_pixels(self, pixels: UInt8[np.ndarray, "height width 3"]) -> UInt8[np.ndarray, "rows columns 3"]:
        """What the model sees of decoded pixels: resized and cut, in new memory."""
        return evaluation_crop(pixels, self.image_size, self.crop_pct, resize=resize).copy()

    def blank(self) -> dict[str, Any]:
        """What stands in for an image that cannot be read: zeros."""
        return {"image": np.zeros((*self.image_size, 3), np.uint8), "label": np.int32(0)}


@dataclass(frozen=True)
class CropTransform:
    """The first step of timm's training transform, its `RandomResizedCropAndInterpolation`, bicubic.

    Called with a sample (`image`: encoded bytes, `label`, `name`) and the sample's generator. Raises UnreadableImage
    before it has drawn anything. Needs neither timm nor torch, so that workers start sooner.
    """

    image_size: tuple[int, int]
    scale: tuple[float, float]
    ratio: tuple[float, float]
    exif: Exif = "keep"

    def __call__(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        pixels = decode_pixels(sample["image"], sample["name"], self.exif)
        top, left, height, width = draw_crop(rng, pixels.shape[:2], self.scale, self.ratio)
        crop = resize(pixels[top : top + height, left : left + width], self.image_size)
        return {"image": crop, "label": np.int32(sample["label"])}


@dataclass(frozen=True)
class Masking:
    """A transform that also draws which cells of the image are masked: `cells` (rows, columns) bool, `count` of them.

    In training by the sample's generator, after all that `transform` draws. In evaluation by `seed` and the bytes of
    the image, so that it is the same in every pass. Training needs no label.
    """

    transform: "TrainTransform | CropTransform | EvalTransform"
    grid: tuple[int, int]
    count: int
    seed: int = 0

    def __call__(self, sample: dict[str, Any], rng: np.random.Generator | None = None) -> dict[str, Any]:
        if rng is not None:
            return {"image": self.transform(sample, rng)["image"], "cells": self._drawn(rng)}
        rng = np.random.default_rng((self.seed, zlib.crc32(sample["image"])))
        return {**self.transform(sample), "cells": self._drawn(rng)}

    def _drawn(self, rng: np.random.Generator) -> Bool[np.ndarray, "rows columns"]:
        return (rng.permutation(math.prod(self.grid)) < self.count).reshape(self.grid)

    def blank(self) -> dict[str, Any]:
        """What stands in for an image that cannot be read."""
        return {**self.transform.blank(), "cells": np.zeros(self.grid, bool)}


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


def train_transform(config: TrainConfig, model_config: CrossViTConfig) -> TrainTransform | CropTransform:
    """What the workers of a run do to its training images: all of it, or what `train.images.augment` leaves to them."""
    if config.augment_on == "device":
        return CropTransform(model_config.image_size, config.crop_scale, config.crop_ratio, config.exif)
    return TrainTransform(config, model_config.image_size)


def eval_transform(model_config: CrossViTConfig, exif: Exif = "keep") -> EvalTransform:
    """The transform of the held-out images for a model."""
    return EvalTransform(model_config.image_size, model_config.crop_pct, exif)
