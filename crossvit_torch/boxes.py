"""Boxes (x1, y1, x2, y2) in pixels of the image: the points that predict them, distances, overlaps, suppression."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crossvit_jax.config import DetectorConfig


class Points(NamedTuple):
    """Where a detector predicts boxes: the points of all levels, level by level and row by row."""

    xy: Float[Tensor, "points 2"]  # in pixels of the image
    stride: Float[Tensor, " points"]
    nearest: Float[Tensor, " points"]  # the longest distance to a side of a box that is its level's is above this
    farthest: Float[Tensor, " points"]  # and below this
    counts: tuple[int, ...]  # of each level


def make_points(
    config: DetectorConfig, dtype: torch.dtype = torch.float32, *, offset: float = 0.5, device=None
) -> Points:
    """The points of a detector's levels, `stride` pixels apart.

    Args:
        offset: of the first point from the image's corner, in strides. The middle of a patch is at 0.5, as in FCOS;
            torchvision's points are at 0.
    """
    levels = []
    for (rows, columns), stride, (nearest, farthest) in zip(
        config.level_grids, config.strides, config.distance_ranges, strict=True
    ):
        y, x = torch.meshgrid(*(torch.arange(side, device=device) for side in (rows, columns)), indexing="ij")
        xy = (torch.stack([x.flatten(), y.flatten()], dim=1) + offset) * stride
        levels.append((xy, *(torch.full((len(xy),), float(v), device=device) for v in (stride, nearest, farthest))))
    tensors = [torch.cat(parts).to(dtype) for parts in zip(*levels, strict=True)]
    return Points(*tensors, counts=tuple(len(level[0]) for level in levels))


def encode(
    xy: Float[Tensor, "*#batch 2"], stride: Float[Tensor, "*#batch"], boxes: Float[Tensor, "*#batch 4"]
) -> Float[Tensor, "... 4"]:
    """Distances in strides from points to the left, top, right and lower side of their boxes."""
    return torch.cat([xy - boxes[..., :2], boxes[..., 2:] - xy], dim=-1) / stride[..., None]


def decode(
    xy: Float[Tensor, "*#batch 2"], stride: Float[Tensor, "*#batch"], distances: Float[Tensor, "*#batch 4"]
) -> Float[Tensor, "... 4"]:
    """The boxes at these distances from points: the inverse of `encode`."""
    distances = distances * stride[..., None]
    return torch.cat([xy - distances[..., :2], xy + distances[..., 2:]], dim=-1)


def clip(boxes: Float[Tensor, "*#batch 4"], size: tuple[int, int]) -> Float[Tensor, "... 4"]:
    """The parts of boxes inside an image of `size` (height, width)."""
    height, width = size
    return torch.minimum(boxes.clamp(min=0), boxes.new_tensor([width, height, width, height]))


def area(boxes: Float[Tensor, "*#batch 4"]) -> Float[Tensor, "..."]:
    """In square pixels."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def intersection(a: Float[Tensor, "*#batch 4"], b: Float[Tensor, "*#batch 4"]) -> Float[Tensor, "..."]:
    """The area that two boxes share."""
    sides = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    return torch.where((sides > 0).all(dim=-1), sides[..., 0] * sides[..., 1], 0)


def giou_loss(
    a: Float[Tensor, "*#batch 4"], b: Float[Tensor, "*#batch 4"], epsilon: float = 1e-7
) -> Float[Tensor, "..."]:
    """1 - the generalised intersection over union of two boxes (arXiv 1902.09630), from 0 to 2."""
    shared = intersection(a, b)
    union = area(a) + area(b) - shared
    hull = area(torch.cat([torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])], dim=-1))
    return 1 - shared / (union + epsilon) + (hull - union) / (hull + epsilon)


def suppress(
    boxes: Float[Tensor, "candidates 4"],
    scores: Float[Tensor, " candidates"],
    labels: Int[Tensor, " candidates"],
    *,
    iou_threshold: float,
    max_detections: int,
) -> tuple[Int[Tensor, " detections"], Bool[Tensor, " detections"]]:
    """The best boxes of an image, best first, after non-maximum suppression within each class.

    Takes the best box that is left, and removes those of its class that overlap it by more than the threshold, until
    there are `max_detections`: the first of those that full suppression would keep, without a table of all overlaps.

    Args:
        scores: -inf for what is no box.

    Returns:
        The indices of the boxes, and whether there is one.
    """
    areas, taken = area(boxes), []
    for _ in range(max_detections):
        best = torch.argmax(scores)
        taken.append((best, scores[best] > -torch.inf))
        shared = intersection(boxes, boxes[best])
        overlaps = shared / (areas + areas[best] - shared) > iou_threshold
        removed = (overlaps & (labels == labels[best])) | (torch.arange(len(scores), device=scores.device) == best)
        scores = torch.where(removed, -torch.inf, scores)
    indices, valid = (torch.stack(parts) for parts in zip(*taken, strict=True))
    return indices, valid
