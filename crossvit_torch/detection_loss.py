"""FCOS's losses (arXiv 2006.09214): which point predicts which box, and how well.

Targets are a dict of `boxes` (batch, boxes, 4), float32, x1 y1 x2 y2 in pixels, `classes` (batch, boxes), int32, and
`present` (batch, boxes), bool: False for what fills up the rows of images with fewer boxes.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crossvit_torch.boxes import Points, area, decode, encode, giou_loss

_RADIUS = 1.5  # strides that a point may be from the middle of its box, along either axis


def assign(
    points: Points, boxes: Float[Tensor, "batch boxes 4"], present: Bool[Tensor, "batch boxes"]
) -> Int[Tensor, "batch points"]:
    """The box that each point is to predict, by its place in the row, or -1.

    A point predicts the smallest box that it lies inside of, near the middle, if that is a box of the point's level.
    """
    boxes, xy = boxes[:, None], points.xy.to(boxes.dtype)[:, None]  # against (batch, points, boxes)
    middle = (boxes[..., :2] + boxes[..., 2:]) / 2
    is_near = (xy - middle).abs().amax(-1) < _RADIUS * points.stride[:, None]
    distances = torch.cat([xy - boxes[..., :2], boxes[..., 2:] - xy], dim=-1)
    longest = distances.amax(-1)
    is_own = (longest > points.nearest[:, None]) & (longest < points.farthest[:, None])
    fits = is_near & (distances.amin(-1) > 0) & is_own & present[:, None]
    smallest = torch.argmin(torch.where(fits, area(boxes), torch.inf), dim=-1)
    return torch.where(fits.any(-1), smallest, -1).to(torch.int32)


def mean_positives(points: Points, targets: Mapping[str, Tensor]) -> Float[Tensor, " batch"]:
    """The mean number of points with a box, over all images and repeated for each: what the losses are divided by.

    Counted over a whole batch, it makes the mean of the losses of its parts the loss of the batch.
    """
    matched = assign(points, targets["boxes"], targets["present"])
    count = (matched >= 0).sum().clamp(min=1).double()
    return (count / len(matched)).expand(len(matched))


def detection_losses(
    outputs: Mapping[str, Float[Tensor, "batch points _"]],
    targets: Mapping[str, Tensor],
    points: Points,
    positives: Float[Tensor, " batch"] | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """The losses `classification`, `bbox_regression` and `bbox_ctrness`, whose sum is to be minimised.

    Args:
        outputs: of the detector; computed with in float32 or wider.
        targets: see above.
        points: the detector's, see `make_points`.
        positives: see `mean_positives`; by default that of these images.
    """
    real = torch.promote_types(outputs["cls_logits"].dtype, torch.float32)
    logits, distances, centreness = (outputs[name].to(real) for name in _OUTPUTS)
    boxes = targets["boxes"].to(real)
    xy, stride = (x.to(real) for x in (points.xy, points.stride))
    matched = assign(points, boxes, targets["present"])
    is_positive = matched >= 0
    total = is_positive.sum().clamp(min=1).to(real) if positives is None else positives.sum().to(real)

    is_matched = matched[..., None] == torch.arange(boxes.shape[1], device=matched.device)
    classes = torch.where(is_matched, targets["classes"][:, None], 0).sum(-1)
    is_class = is_positive[..., None] & (classes[..., None] == torch.arange(logits.shape[-1], device=logits.device))
    own = torch.where(is_matched[..., None], boxes[:, None], 0).sum(-2)
    # where there is no box, any proper one, so that no gradient is NaN
    around = torch.cat([xy - stride[:, None], xy + stride[:, None]], dim=-1)
    own = torch.where(is_positive[..., None], own, around)

    def mean(losses: Tensor) -> Tensor:
        return torch.where(is_positive, losses, 0).sum() / total

    return {
        "classification": focal_loss(logits, is_class).sum() / total,
        "bbox_regression": mean(giou_loss(decode(xy, stride, distances), own)),
        "bbox_ctrness": mean(binary_cross_entropy(centreness[..., 0], centreness_of(encode(xy, stride, own)))),
    }


_OUTPUTS = ("cls_logits", "bbox_regression", "bbox_ctrness")


def focal_loss(
    logits: Float[Tensor, "*shape"], is_class: Bool[Tensor, "*shape"], alpha: float = 0.25, gamma: int | float = 2
) -> Float[Tensor, "*shape"]:
    """Binary cross-entropy that weighs what is sure less (arXiv 1708.02002)."""
    signed = torch.where(is_class, -logits, logits)
    return torch.where(is_class, alpha, 1 - alpha) * signed.sigmoid() ** gamma * _softplus(signed)


def binary_cross_entropy(logits: Float[Tensor, "*shape"], targets: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Of targets from 0 to 1."""
    return _softplus(logits) - logits * targets


def _softplus(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    return torch.logaddexp(x, x.new_zeros(()))  # torch's own becomes linear from 20 on


def centreness_of(distances: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch"]:
    """How near a point is to the middle of its box, from 0 at a side to 1, by its distances to the sides."""
    one, other = distances[..., :2], distances[..., 2:]
    return (torch.minimum(one, other) / torch.maximum(one, other)).prod(-1).sqrt()
