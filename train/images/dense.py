"""From a sample with boxes or masks to what a detector or segmenter is given.

A sample is what sources of `train.data.dense` give: `image` (encoded bytes), `name`, and what belongs to the picture as
`Boxes` or as `segments`. Transforms are picklable, draw from the sample's own generator only, and raise UnreadableImage
before they have drawn anything; those of evaluation have `blank()`, a sample that stands in for an unreadable image.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

from crossvit_jax.preprocess import Exif, UnreadableImage, normalised
from train.images.colour import draw_colour, jitter_colour
from train.images.decode import decode_pixels
from train.images.geometry import (
    IGNORED,
    Boxes,
    Placement,
    draw_placement,
    place_boxes,
    place_pixels,
    place_segments,
    whole_placement,
)

Sample = dict[str, Any]

_JITTER_BYTES = 24  # of a pixel while colour is jittered: three images of Pillow's, and the copies between them


def padded_boxes(objects: Boxes, placement: Placement, most_boxes: int) -> dict[str, np.ndarray]:
    """What a batch has of a picture's objects: `boxes` (most_boxes, 4) float32 x1, y1, x2, y2 in pixels of the canvas,
    `classes` (most_boxes,) int32, `present` (most_boxes,) bool.

    First come the objects that are to be found and are on the canvas, in their order; the rest is 0 and not present.
    Raises ValueError if there are more than fit, as there never are with the largest count of the data set.
    """
    boxes, kept = place_boxes(objects.boxes, placement)
    kept &= ~objects.crowd
    count = int(kept.sum())
    if count > most_boxes:
        raise ValueError(f"{count} boxes do not fit into {most_boxes} places")
    padded = {
        "boxes": np.zeros((most_boxes, 4), np.float32),
        "classes": np.zeros(most_boxes, np.int32),
        "present": np.arange(most_boxes) < count,
    }
    padded["boxes"][:count], padded["classes"][:count] = boxes[kept], objects.classes[kept]
    return padded


@dataclass(frozen=True)
class _Augment:
    """Scale jitter, flips and colour: drawn once, done to the picture and to what belongs to it."""

    image_size: tuple[int, int]
    scale_jitter: tuple[float, float] = (1.0, 1.0)
    hflip: float = 0.0
    vflip: float = 0.0
    color_jitter: float = 0.0
    exif: Exif = "keep"

    def _drawn(self, sample: Sample, rng: np.random.Generator) -> tuple[Float32[np.ndarray, "rows cols 3"], Placement]:
        pixels = decoded(sample, self.exif, at_least=_JITTER_BYTES if self.color_jitter else 0)
        how = {"scale_jitter": self.scale_jitter, "hflip": self.hflip, "vflip": self.vflip}
        placement = draw_placement(rng, pixels.shape[:2], self.image_size, **how)
        if self.color_jitter:
            pixels = jitter_colour(pixels, draw_colour(rng, self.color_jitter))
        return normalised(place_pixels(pixels, placement)), placement


@dataclass(frozen=True)
class DetectionTrainTransform(_Augment):
    """`image` (height, width, 3) float32, normalised, and the arrays of `padded_boxes`."""

    most_boxes: int = 1

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        image, placement = self._drawn(sample, rng)
        return {"image": image, **padded_boxes(sample["objects"], placement, self.most_boxes)}


@dataclass(frozen=True)
class SegmentationTrainTransform(_Augment):
    """`image` (height, width, 3) float32, normalised, and `segments` (height, width) uint8: classes, or `IGNORED`."""

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        image, placement = self._drawn(sample, rng)
        return {"image": image, "segments": place_segments(sample["segments"], placement)}


@dataclass(frozen=True)
class _Whole:
    """All of a picture, its longer side resized to the model's, the rest padded right and below; `image` is uint8."""

    image_size: tuple[int, int]
    exif: Exif = "keep"

    def _placed(self, sample: Sample) -> tuple[UInt8[np.ndarray, "rows cols 3"], Placement]:
        pixels = decoded(sample, self.exif)
        return self.seen_pixels(pixels), whole_placement(pixels.shape[:2], self.image_size)

    def seen_pixels(self, pixels: UInt8[np.ndarray, "height width 3"]) -> UInt8[np.ndarray, "rows cols 3"]:
        """What the model sees of decoded pixels: resized and padded, in new memory."""
        return place_pixels(pixels, whole_placement(pixels.shape[:2], self.image_size))

    def _blank_image(self) -> UInt8[np.ndarray, "rows cols 3"]:
        return np.zeros((*self.image_size, 3), np.uint8)


@dataclass(frozen=True)
class DetectionEvalTransform(_Whole):
    """Beside the image what `DetectionTrainTransform` gives."""

    most_boxes: int = 1

    def __call__(self, sample: Sample) -> Sample:
        image, placement = self._placed(sample)
        return {"image": image, **padded_boxes(sample["objects"], placement, self.most_boxes)}

    def blank(self) -> Sample:
        empty = Boxes(np.zeros((0, 4)), np.zeros(0, np.int32), np.zeros(0, bool), np.zeros(0))
        nowhere = whole_placement(self.image_size, self.image_size)
        return {"image": self._blank_image(), **padded_boxes(empty, nowhere, self.most_boxes)}


@dataclass(frozen=True)
class SegmentationEvalTransform(_Whole):
    """Beside the image what `SegmentationTrainTransform` gives."""

    def __call__(self, sample: Sample) -> Sample:
        image, placement = self._placed(sample)
        return {"image": image, "segments": place_segments(sample["segments"], placement)}

    def blank(self) -> Sample:
        return {"image": self._blank_image(), "segments": np.full(self.image_size, IGNORED, np.uint8)}


@dataclass(frozen=True)
class WholeTransform(_Whole):
    """For prediction: `image`, and `size` (2,) int32, the picture's height and width."""

    def __call__(self, sample: Sample) -> Sample:
        image, placement = self._placed(sample)
        return {"image": image, "size": np.array(placement.size, np.int32)}

    def blank(self) -> Sample:
        return {"image": self._blank_image(), "size": np.array(self.image_size, np.int32)}


def decoded(sample: Sample, exif: Exif = "keep", *, at_least: int = 0) -> UInt8[np.ndarray, "height width 3"]:
    """The pixels of a sample's picture. `at_least`: see `decode_pixels`.

    Raises UnreadableImage, also where they are of another size than that which boxes or mask are for.
    """
    pixels = decode_pixels(sample["image"], sample["name"], exif, at_least=at_least)
    size = sample["segments"].shape if "segments" in sample else sample.get("size")
    if size is not None and tuple(size) != pixels.shape[:2]:
        (height, width), (rows, columns) = pixels.shape[:2], size
        what = "its mask is" if "segments" in sample else "its boxes are for"
        raise UnreadableImage(sample["name"], f"it has {width} x {height} pixels, and {what} {columns} x {rows}")
    return pixels
