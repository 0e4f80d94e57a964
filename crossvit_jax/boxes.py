"""Boxes (x1, y1, x2, y2) in pixels of the image: the points that predict them, distances, overlaps, suppression."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from crossvit_jax.config import DetectorConfig


class Points(NamedTuple):
    """Where a detector predicts boxes: the points of all levels, level by level and row by row."""

    xy: Float[np.ndarray, "points 2"]  # in pixels of the image
    stride: Float[np.ndarray, " points"]
    nearest: Float[np.ndarray, " points"]  # the longest distance to a side of a box that is its level's is above this
    farthest: Float[np.ndarray, " points"]  # and below this
    counts: tuple[int, ...]  # of each level


def make_points(config: DetectorConfig, dtype: Any = np.float32, *, offset: float = 0.5) -> Points:
    """The points of a detector's levels, `stride` pixels apart.

    Args:
        offset: of the first point from the image's corner, in strides. The middle of a patch is at 0.5, as in FCOS;
            torchvision's points are at 0.
    """
    levels = []
    for (rows, columns), stride, (nearest, farthest) in zip(
        config.level_grids, config.strides, config.distance_ranges, strict=True
    ):
        y, x = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
        xy = (np.stack([x.ravel(), y.ravel()], axis=1) + offset) * stride
        levels.append((xy, *(np.full(len(xy), value) for value in (stride, nearest, farthest))))
    arrays = [np.concatenate(parts).astype(dtype) for parts in zip(*levels, strict=True)]
    return Points(*arrays, counts=tuple(len(level[0]) for level in levels))


def encode(
    xy: Float[Array, "*#batch 2"], stride: Float[Array, "*#batch"], boxes: Float[Array, "*#batch 4"]
) -> Float[Array, "... 4"]:
    """Distances in strides from points to the left, top, right and lower side of their boxes."""
    return jnp.concatenate([xy - boxes[..., :2], boxes[..., 2:] - xy], axis=-1) / stride[..., None]


def decode(
    xy: Float[Array, "*#batch 2"], stride: Float[Array, "*#batch"], distances: Float[Array, "*#batch 4"]
) -> Float[Array, "... 4"]:
    """The boxes at these distances from points: the inverse of `encode`."""
    distances = distances * stride[..., None]
    return jnp.concatenate([xy - distances[..., :2], xy + distances[..., 2:]], axis=-1)


def clip(boxes: Float[Array, "*#batch 4"], size: tuple[int, int]) -> Float[Array, "... 4"]:
    """The parts of boxes inside an image of `size` (height, width)."""
    height, width = size
    return jnp.clip(boxes, 0, jnp.array([width, height, width, height], boxes.dtype))


def area(boxes: Float[Array, "*#batch 4"]) -> Float[Array, "..."]:
    """In square pixels."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def intersection(a: Float[Array, "*#batch 4"], b: Float[Array, "*#batch 4"]) -> Float[Array, "..."]:
    """The area that two boxes share."""
    sides = jnp.minimum(a[..., 2:], b[..., 2:]) - jnp.maximum(a[..., :2], b[..., :2])
    return jnp.where(jnp.all(sides > 0, axis=-1), sides[..., 0] * sides[..., 1], 0)


def giou_loss(a: Float[Array, "*#batch 4"], b: Float[Array, "*#batch 4"], epsilon: float = 1e-7) -> Float[Array, "..."]:
    """1 - the generalised intersection over union of two boxes (arXiv 1902.09630), from 0 to 2."""
    shared = intersection(a, b)
    union = area(a) + area(b) - shared
    hull = area(jnp.concatenate([jnp.minimum(a[..., :2], b[..., :2]), jnp.maximum(a[..., 2:], b[..., 2:])], axis=-1))
    return 1 - shared / (union + epsilon) + (hull - union) / (hull + epsilon)


def suppress(
    boxes: Float[Array, "candidates 4"],
    scores: Float[Array, " candidates"],
    labels: Int[Array, " candidates"],
    *,
    iou_threshold: float,
    max_detections: int,
) -> tuple[Int[Array, " detections"], Bool[Array, " detections"]]:
    """The best boxes of an image, best first, after non-maximum suppression within each class.

    Takes the best box that is left, and removes those of its class that overlap it by more than the threshold, until
    there are `max_detections`: the first of those that full suppression would keep, without a table of all overlaps.

    Args:
        scores: -inf for what is no box.

    Returns:
        The indices of the boxes, and whether there is one.
    """
    areas = area(boxes)

    def take(scores: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
        best = jnp.argmax(scores)
        shared = intersection(boxes, boxes[best])
        overlaps = shared / (areas + areas[best] - shared) > iou_threshold
        removed = (overlaps & (labels == labels[best])) | (jnp.arange(len(scores)) == best)
        return jnp.where(removed, -jnp.inf, scores), (best, scores[best] > -jnp.inf)

    return jax.lax.scan(take, scores, None, length=max_detections)[1]
