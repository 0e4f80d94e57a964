"""What the server needs of a model, and the sizes of its batches."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Float32, UInt8

from crossvit_jax.preprocess import Exif

Images = UInt8[np.ndarray, "pictures height width 3"]


class Transform(Protocol):
    """From decoded pixels to what the model sees: `EvalTransform` of a classifier, `WholeTransform` of the others."""

    exif: Exif

    def seen_pixels(self, pixels: UInt8[np.ndarray, "height width 3"]) -> UInt8[np.ndarray, "rows columns 3"]: ...


class Explained(NamedTuple):
    """An image's probabilities (classes,), and `class_token_attention` of it."""

    probabilities: Float32[np.ndarray, " classes"]
    attention: dict[str, list[np.ndarray]]


class Engine(Protocol):
    """What the server needs of a model. Only one thread calls it."""

    config: Any  # the model's settings, with `task` and `image_size`
    class_names: Sequence[str]  # in the order of the outputs
    transform: Transform
    sizes: tuple[int, ...]  # of batches, the smallest first
    most_objects: int  # that a detector finds in a picture; 0 of other models
    platform: str  # what computes, in a word
    headline: str  # what it is, in words
    explains: bool  # whether it can tell what it attends to

    def compile(self) -> None:
        """Makes every program that will be called."""

    def compute(self, images: Images) -> Sequence[Any]:
        """Of each image, which are as many as the largest batch holds, or fewer: a classifier's probabilities
        (classes,), float32; of other models what `found` of their task tells of an image."""

    def explain(self, images: Images) -> Explained:
        """Of one image (1, height, width, 3)."""


def batch_sizes(largest: int, *, devices: int = 1) -> tuple[int, ...]:
    """1, 2, 4, … and the largest, or the next multiples of the number of devices."""
    powers = [2**power for power in range(largest.bit_length()) if 2**power < largest]
    return tuple(sorted({-(-size // devices) * devices for size in (*powers, largest)}))


def rows_of(outputs: dict[str, np.ndarray], count: int) -> list[dict[str, np.ndarray]]:
    """The outputs of a batch, image by image."""
    return [{name: array[row] for name, array in outputs.items()} for row in range(count)]
