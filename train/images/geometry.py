"""How a picture comes onto the model's canvas, and the way back: one placement for pixels, boxes and masks.

A placement is data. It is drawn for training (`draw_placement`) or follows from the sizes (`whole_placement`, for
evaluation); `place_pixels`, `place_boxes` and `place_segments` do it to what belongs to the picture, and
`boxes_in_picture` and `classes_in_picture` map predictions back.

Boxes are x1, y1, x2, y2 in pixels, from the upper left corner of the first pixel. Pixels are resized by Pillow's
bicubic filter, boxes by the ratio of the sizes, masks to the nearest as torchvision.transforms.v2 does it.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Num, UInt8

from crossvit_jax.preprocess import MEAN
from train.images.resize import resize

IGNORED = 255  # in masks: counts neither in a loss nor in a score
# A box of which less than this share is on the canvas, or less than a pixel in a direction, is dropped.
LEAST_VISIBLE, LEAST_SIDE = 0.4, 1.0

_PADDING = tuple(round(255 * mean) for mean in MEAN)  # about 0 when it is normalised
_STRIP = 2**22  # logits that are resized at a time


class Boxes(NamedTuple):
    """The objects of a picture."""

    boxes: Float[np.ndarray, "boxes 4"]  # x1, y1, x2, y2 in pixels of the picture
    classes: Int[np.ndarray, " boxes"]  # from 0
    crowd: Bool[np.ndarray, " boxes"]  # not to be trained on, and ignored in scores
    area: Float[np.ndarray, " boxes"]  # by which scores tell small from large: of the object, or of its box


class Placement(NamedTuple):
    """A picture is resized, mirrored and turned upside down where wanted, and a window of it put into the upper left
    corner of the canvas.

    Whatever of the canvas the picture does not reach is padding, right and below.
    """

    size: tuple[int, int]  # height, width of the picture
    resized: tuple[int, int]
    canvas: tuple[int, int]
    top: int = 0  # of the window, in the resized picture
    left: int = 0
    mirrored: bool = False
    upside_down: bool = False

    @property
    def covered(self) -> tuple[int, int]:
        """Height and width of the part of the canvas that the picture covers."""
        top_left = (self.top, self.left)
        height, width = (
            min(side, whole - start) for side, whole, start in zip(self.canvas, self.resized, top_left, strict=True)
        )
        return height, width

    @property
    def scale(self) -> tuple[float, float]:
        """Pixels of the canvas for one of the picture, along x and y."""
        return self.resized[1] / self.size[1], self.resized[0] / self.size[0]


def whole_placement(size: tuple[int, int], canvas: tuple[int, int], scale: float = 1.0) -> Placement:
    """All of a picture of a size (height, width): its side that is longer, compared with the canvas, becomes that of
    the canvas; nothing is squashed or cut.

    Args:
        scale: on top of that; above 1, what is beyond the canvas is cut off right and below.
    """
    ratio = scale * min(side / own for side, own in zip(canvas, size, strict=True))
    height, width = (max(1, round(own * ratio)) for own in size)
    return Placement(size, (height, width), canvas)


def draw_placement(
    rng: np.random.Generator,
    size: tuple[int, int],
    canvas: tuple[int, int],
    *,
    scale_jitter: tuple[float, float],
    hflip: float,
    vflip: float = 0.0,
) -> Placement:
    """Large-scale jitter: a scale, a window at a random place where the picture is then larger than the canvas, flips.

    Four numbers are drawn whatever the sizes are, and one more where there is a `vflip`.

    Args:
        size, canvas: (height, width).
        scale_jitter: smallest and largest scale; 1: the picture just fits, as in evaluation.
        hflip, vflip: probability of being mirrored, and of being turned upside down.
    """
    scale, flip, *places = rng.uniform(size=4)
    low, high = scale_jitter
    placement = whole_placement(size, canvas, low + (high - low) * scale)
    rooms = [max(0, whole - side) for whole, side in zip(placement.resized, canvas, strict=True)]
    top, left = (int(place * (room + 1)) for place, room in zip(places, rooms, strict=True))
    upside_down = bool(vflip and rng.uniform() < vflip)
    return placement._replace(top=top, left=left, mirrored=bool(flip < hflip), upside_down=upside_down)


# --- onto the canvas ---


def place_pixels(pixels: UInt8[np.ndarray, "height width 3"], placement: Placement) -> UInt8[np.ndarray, "rows cols 3"]:
    """The canvas with a picture; the padding is ImageNet's mean colour."""
    resized = pixels if placement.resized == placement.size else resize(pixels, placement.resized)
    canvas = np.empty((*placement.canvas, 3), np.uint8)
    height, width = placement.covered
    canvas[:height, :width] = _window(resized, placement)
    canvas[height:] = canvas[:, width:] = _PADDING
    return canvas


def place_segments(segments: UInt8[np.ndarray, "height width"], placement: Placement) -> UInt8[np.ndarray, "rows cols"]:
    """The canvas with the classes of a picture's pixels; the padding is `IGNORED`."""
    rows, columns = (_nearest(old, new) for old, new in zip(placement.size, placement.resized, strict=True))
    canvas = np.full(placement.canvas, IGNORED, np.uint8)
    height, width = placement.covered
    canvas[:height, :width] = _window(segments[rows[:, None], columns], placement)
    return canvas


def place_boxes(
    boxes: Float[np.ndarray, "boxes 4"], placement: Placement
) -> tuple[Float32[np.ndarray, "boxes 4"], Bool[np.ndarray, " boxes"]]:
    """Boxes of a picture on the canvas, cut to what it covers, and which of them are kept.

    Kept is a box of which at least `LEAST_VISIBLE` of the area and `LEAST_SIDE` pixels in both directions are left.
    """
    placed = boxes.astype(np.float64) * (placement.scale * 2)
    if placement.mirrored:
        placed[:, [0, 2]] = placement.resized[1] - placed[:, [2, 0]]
    if placement.upside_down:
        placed[:, [1, 3]] = placement.resized[0] - placed[:, [3, 1]]
    placed -= (placement.left, placement.top) * 2
    area = np.prod(placed[:, 2:] - placed[:, :2], axis=1)
    height, width = placement.covered
    placed = np.clip(placed, 0, (width, height) * 2)
    sides = placed[:, 2:] - placed[:, :2]
    kept = (sides >= LEAST_SIDE).all(1) & (np.prod(sides, axis=1) >= LEAST_VISIBLE * area)
    return placed.astype(np.float32), kept


def _window(resized: np.ndarray, placement: Placement) -> np.ndarray:
    if placement.mirrored:
        resized = resized[:, ::-1]
    if placement.upside_down:
        resized = resized[::-1]
    height, width = placement.covered
    return resized[placement.top : placement.top + height, placement.left : placement.left + width]


def _nearest(size: int, resized: int) -> np.ndarray:
    """The places that an axis takes its values from: torch's `nearest`, in its single precision."""
    scale = np.float32(size) / np.float32(resized)
    return np.minimum((np.arange(resized, dtype=np.float32) * scale).astype(np.int64), size - 1)


# --- back to the picture ---


def boxes_in_picture(boxes: Float[np.ndarray, "boxes 4"], placement: Placement) -> Float[np.ndarray, "boxes 4"]:
    """Boxes on the canvas as boxes of the picture, cut to it, float64."""
    back = boxes + np.array((placement.left, placement.top) * 2, np.float64)
    if placement.mirrored:
        back[:, [0, 2]] = placement.resized[1] - back[:, [2, 0]]
    if placement.upside_down:
        back[:, [1, 3]] = placement.resized[0] - back[:, [3, 1]]
    height, width = placement.size
    return np.clip(back / (placement.scale * 2), 0, (width, height) * 2)


def logits_in_picture(
    logits: Float[np.ndarray, "rows cols classes"], placement: Placement
) -> Float[np.ndarray, "height width classes"]:
    """Logits on the canvas, resized to the picture: torch's `interpolate`, bilinear, without `align_corners`.

    Raises ValueError if the placement has cut something off, of which there are no logits.
    """
    return np.concatenate(list(_strips(logits, placement)))


def classes_in_picture(
    logits: Float[np.ndarray, "rows cols classes"], placement: Placement
) -> UInt8[np.ndarray, "height width"]:
    """The class of each pixel of the picture, by the largest of `logits_in_picture`; the first of several alike."""
    strips = (strip.argmax(-1).astype(np.uint8) for strip in _strips(logits, placement))
    return np.concatenate(list(strips))


def _strips(logits: np.ndarray, placement: Placement):
    """The rows of the picture, so many at a time that memory stays small."""
    if placement.covered != placement.resized:
        raise ValueError(f"a part of the picture is not on the canvas: {placement}")
    height, width = placement.size
    logits = np.asarray(logits)[: placement.resized[0], : placement.resized[1]]
    if placement.mirrored:
        logits = logits[:, ::-1]
    if placement.upside_down:
        logits = logits[::-1]
    at_a_time = max(1, _STRIP // (width * logits.shape[-1]))
    for first in range(0, height, at_a_time):
        rows = _between(logits, placement.resized[0], height, slice(first, first + at_a_time))
        columns = _between(rows.swapaxes(0, 1), placement.resized[1], width, slice(None))
        yield columns.swapaxes(0, 1)


def _between(values: Num[np.ndarray, "..."], old: int, new: int, places: slice) -> Num[np.ndarray, "..."]:
    """Some places of the first axis after resizing, between the two nearest values."""
    if old == new:
        return values[places]
    source = np.maximum((np.arange(new)[places] + 0.5) * (old / new) - 0.5, 0)
    first = np.minimum(source.astype(np.int64), old - 1)
    share = (source - first).astype(values.dtype).reshape(-1, *[1] * (values.ndim - 1))
    return values[first] * (1 - share) + values[np.minimum(first + 1, old - 1)] * share
