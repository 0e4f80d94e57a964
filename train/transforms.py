"""From an encoded image to the model's input: timm's own transforms, made to draw from a generator of ours.

timm draws from the global generators of Python, numpy and torch. For each image they are set from the sample's own
generator, so that its pixels depend on nothing else. The transforms are built on first use, in the process that uses
them: importing timm takes seconds, and a worker pays for it while the main process compiles. What can be done faster
with the same pixels is done here: decoding, the crop and its resizing, and the way to normalised values.
"""

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
from jaxtyping import Float32
from PIL import Image, ImageOps

from crossvit_jax.config import CrossViTConfig
from train.config import TrainConfig
from train.crop import CropTransform
from train.decode import decode_image, decode_pixels

# The generators belong to one image at a time: reader threads take turns. Reading and decoding are outside.
_generators_lock = threading.Lock()

# Reader threads begin at the same time, and timm's modules import each other in a circle: two threads in it meet.
_import_lock = threading.Lock()


@contextmanager
def _timm_drawing_from(rng: np.random.Generator) -> Iterator[None]:
    """Whatever timm and torchvision draw in here follows from `rng` alone."""
    data = _timm_data()
    import torch

    auto_augment, random_erasing, transforms = data.auto_augment, data.random_erasing, data.transforms
    python_seed, numpy_seed, torch_seed = (int(seed) for seed in rng.integers(0, 2**32, size=3))
    with _generators_lock:
        # other threads may use Python's generator at any time (wandb, beartype), so timm gets one that nobody shares
        auto_augment.random = random_erasing.random = transforms.random = random.Random(python_seed)
        np.random.seed(numpy_seed)
        torch.default_generator.manual_seed(torch_seed)  # torch.manual_seed would also visit every accelerator
        try:
            yield
        finally:
            auto_augment.random = random_erasing.random = transforms.random = random


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


@dataclass(frozen=True)
class TrainTransform:
    """timm's training transform: random crop, flip, RandAugment, normalisation, random erasing.

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
        return data.create_transform(
            (3, *self.image_size),
            is_training=True,
            scale=self.config.crop_scale,
            ratio=self.config.crop_ratio,
            hflip=self.config.hflip,
            color_jitter=None,
            auto_augment=self.config.auto_augment or None,
            interpolation="bicubic",
            re_prob=self.config.erase_prob,
            re_mode="pixel",
        )

    @cached_property
    def _steps(self):
        """timm's crop, its steps before an image becomes a tensor, mean, deviation, and the steps after these."""
        crop, *steps = self.timm_transform.transforms
        tensor = _timm_data().transforms.MaybeToTensor
        (end,) = (place for place, step in enumerate(steps) if isinstance(step, tensor))
        normalise = steps[end + 1]
        # for each value of a row of pixels: numpy is slow at using the same three again and again
        mean, std = (np.tile(x.numpy(), self.image_size[1]) for x in (normalise.mean, normalise.std))
        return crop, steps[:end], mean, std, steps[end + 2 :]

    def __call__(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        from train.resample import resize  # compiles itself at import, which only workers need

        pixels = decode_pixels(sample["image"], sample["name"])
        crop, before, mean, std, after = self._steps
        import torch  # after timm, which one thread at a time imports

        height, width, _ = pixels.shape
        with _timm_drawing_from(rng):
            box = crop.get_params(Image.new("1", (width, height)), crop.scale, crop.ratio)
            image = Image.fromarray(resize(_part(pixels, *box), self.image_size))
            for step in before:
                image = step(image)
            rows = np.asarray(image).reshape(self.image_size[0], -1) / np.float32(255)
            rows -= mean
            rows /= std
            pixels = rows.reshape(*self.image_size, 3)
            for step in after:
                step(torch.from_numpy(pixels).permute(2, 0, 1))  # in place
        return {"image": pixels, "label": np.int32(sample["label"])}


def _part(pixels: np.ndarray, top: int, left: int, height: int, width: int) -> np.ndarray:
    """A part of an image, of at least one pixel: of few pixels timm may draw none, and makes black of that."""
    top, left = min(top, pixels.shape[0] - 1), min(left, pixels.shape[1] - 1)
    return pixels[top : top + max(1, height), left : left + max(1, width)]


@dataclass(frozen=True)
class EvalTransform:
    """timm's evaluation transform: the shorter side resized to size / crop_pct, centre crop, normalisation.

    Called with a sample (`image`: encoded bytes, `label`, `name`). Raises UnreadableImage.
    """

    image_size: tuple[int, int]
    crop_pct: float

    @cached_property
    def timm_transform(self):
        """A torchvision `Compose`."""
        return _timm_data().create_transform((3, *self.image_size), interpolation="bicubic", crop_pct=self.crop_pct)

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        pixels = self.timm_transform(decode_image(sample["image"], sample["name"]))
        return {"image": channels_last(pixels), "label": np.int32(sample["label"])}


def channels_last(pixels) -> Float32[np.ndarray, "height width channels"]:
    """A torch tensor (channels, height, width) as a numpy array in the model's order."""
    return np.ascontiguousarray(pixels.numpy().transpose(1, 2, 0))


def train_transform(config: TrainConfig, model_config: CrossViTConfig) -> TrainTransform | CropTransform:
    """What the workers of a run do to its training images: all of it, or what `train.augment` leaves to them."""
    if config.augment_on == "device":
        return CropTransform(model_config.image_size, config.crop_scale, config.crop_ratio)
    return TrainTransform(config, model_config.image_size)


def eval_transform(model_config: CrossViTConfig) -> EvalTransform:
    """The transform of the held-out images for a model."""
    return EvalTransform(model_config.image_size, model_config.crop_pct)
