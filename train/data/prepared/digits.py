"""The 1,797 handwritten digits inside scikit-learn, in memory: real images with no download.

They are 8×8 grey pixels with 17 levels, from the test set of the UCI collection "Optical Recognition of Handwritten
Digits". A fifth of each class is held out, by a fixed seed.

Earlier versions wrote them as a tensorflow-datasets set. Bytes, order and names are the same, so that a run of theirs
goes on with the same batches.
"""

import hashlib
import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from convert.digits import held_out_indices, load_digits
from train.data.sources import TRAIN_SPLIT, ImageSets

NAME = "sklearn_digits"  # of the tensorflow-datasets set
_HELD_OUT_SPLIT = "test"


@dataclass(frozen=True)
class DigitsSource:
    """A split of the digits: each image as PNG (8×8, RGB) and its label, 0 to 9."""

    split: str
    images: tuple[bytes, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = f"{index} of split {self.split}"
        return {"image": self.images[index], "label": self.labels[index], "name": name}


def digits_in_memory() -> ImageSets:
    """All digits: 1,438 for training, 359 held out. Raises MissingExtra where scikit-learn is not installed."""
    pixels, labels = load_digits()
    held_out = held_out_indices(labels)
    training = np.setdiff1d(np.arange(len(labels)), held_out)
    sources = {TRAIN_SPLIT: _source(pixels, labels, TRAIN_SPLIT, training)}
    sources[_HELD_OUT_SPLIT] = _source(pixels, labels, _HELD_OUT_SPLIT, held_out)
    counts = " ".join(f"{split}={len(source)}" for split, source in sources.items())
    class_names = tuple(str(digit) for digit in range(10))
    return ImageSets(*sources.values(), class_names, _HELD_OUT_SPLIT, f"{NAME}/1.0.0 {counts}")


def _source(pixels: np.ndarray, labels: np.ndarray, split: str, indices: Iterable[int]) -> DigitsSource:
    """The digits with these indices, in the order in which tensorflow-datasets stores them: that of a hash."""
    stored = sorted(map(int, indices), key=lambda index: hashlib.md5(f"{split}{index}".encode()).digest())
    images = tuple(_png(pixels[index]) for index in stored)
    return DigitsSource(split, images, tuple(int(labels[index]) for index in stored))


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).convert("RGB").save(file, format="PNG")
    return file.getvalue()
