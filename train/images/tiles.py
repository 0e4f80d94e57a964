"""Large pictures in windows: where these are, and one answer of what is found in each of them."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8


class Tiling(NamedTuple):
    """How pictures are cut."""

    side: int  # of a window, in pixels of the picture
    overlap: float  # of neighbouring windows, as a share of the side: at least 0, below 1


class Window(NamedTuple):
    """A part of a picture, in its pixels."""

    top: int
    left: int
    height: int
    width: int


def windows(size: tuple[int, int], tiling: Tiling) -> Iterator[Window]:
    """The windows that cover a picture of a size (height, width), row by row.

    The last ones of a row or column are moved inside, so that they overlap more. A side of the picture that is shorter
    than a window's is that of its windows.
    """
    side, overlap = tiling
    height, width = (min(side, whole) for whole in size)
    step = max(1, round(side * (1 - overlap)))
    tops, lefts = (
        [min(start, whole - own) for start in range(0, max(1, whole - own + step), step)]
        for whole, own in zip(size, (height, width), strict=True)
    )
    return (Window(top, left, height, width) for top in tops for left in lefts)


def suppress(
    boxes: Float[np.ndarray, "boxes 4"],
    scores: Float[np.ndarray, " boxes"],
    classes: Int[np.ndarray, " boxes"],
    *,
    iou_threshold: float,
    most: int,
) -> Int[np.ndarray, " kept"]:
    """The places of the boxes that non-maximum suppression within each class keeps, the best first, at most so many.

    As `crossvit_jax.boxes.suppress`, for any number of boxes.
    """
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    left, kept = np.argsort(-scores, kind="stable"), []
    while len(left) and len(kept) < most:
        best, left = left[0], left[1:]
        kept.append(best)
        sides = np.minimum(boxes[left, 2:], boxes[best, 2:]) - np.maximum(boxes[left, :2], boxes[best, :2])
        shared = np.prod(np.maximum(sides, 0), axis=1)
        union = areas[left] + areas[best] - shared
        left = left[(shared <= iou_threshold * union) | (classes[left] != classes[best])]
    return np.array(kept, np.int64)


class ClassesOfWindows:
    """The class of each pixel of a picture, by the mean of the logits of all windows that it is in.

    Windows are added in the order of `windows`. Only the rows that a window reaches are kept as logits.
    """

    def __init__(self, size: tuple[int, int]):
        self._size = size
        self._done: list[UInt8[np.ndarray, "rows width"]] = []
        self._top = 0  # of the rows whose logits are kept
        # As many windows are summed up in a pixel whatever the class: the largest sum is the largest mean.
        self._sums: Float[np.ndarray, "rows width classes"] | None = None

    def add(self, window: Window, logits: Float[np.ndarray, "height width classes"]) -> None:
        """The logits of the pixels of the next window."""
        if self._sums is None:
            self._sums = np.zeros((window.height, self._size[1], logits.shape[-1]), logits.dtype)
        self._finish(window.top)
        self._sums[:, window.left : window.left + window.width] += logits

    def classes(self) -> UInt8[np.ndarray, "height width"]:
        """After the last window."""
        self._finish(self._size[0])
        return np.concatenate(self._done)

    def _finish(self, top: int) -> None:
        """Tells the classes of the rows above, which no later window reaches."""
        rows = top - self._top
        if not rows:
            return
        self._done.append(self._sums[:rows].argmax(-1).astype(np.uint8))
        self._sums[: -rows or None] = self._sums[rows:]
        self._sums[len(self._sums) - rows :] = 0
        self._top = top


def joined(
    parts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], *, iou_threshold: float, most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes (in pixels of the picture), scores and classes of its windows as those of the picture, the best first.

    Those of a single window stay as they are.
    """
    if len(parts) == 1:
        return parts[0]
    boxes, scores, classes = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    kept = suppress(boxes, scores, classes, iou_threshold=iou_threshold, most=most)
    return boxes[kept], scores[kept], classes[kept]
