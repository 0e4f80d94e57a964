"""FCOS's losses (arXiv 2006.09214): which point predicts which box, and how well.

Targets are a dict of `boxes` (batch, boxes, 4), float32, x1 y1 x2 y2 in pixels, `classes` (batch, boxes), int32, and
`present` (batch, boxes), bool: False for what fills up the rows of images with fewer boxes.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from crossvit_jax.boxes import Points, area, decode, encode, giou_loss

_RADIUS = 1.5  # strides that a point may be from the middle of its box, along either axis


def assign(
    points: Points, boxes: Float[Array, "batch boxes 4"], present: Bool[Array, "batch boxes"]
) -> Int[Array, "batch points"]:
    """The box that each point is to predict, by its place in the row, or -1.

    A point predicts the smallest box that it lies inside of, near the middle, if that is a box of the point's level.
    """
    boxes, xy = boxes[:, None], jnp.asarray(points.xy, boxes.dtype)[:, None]  # against (batch, points, boxes)
    middle = (boxes[..., :2] + boxes[..., 2:]) / 2
    is_near = jnp.abs(xy - middle).max(-1) < _RADIUS * points.stride[:, None]
    distances = jnp.concatenate([xy - boxes[..., :2], boxes[..., 2:] - xy], axis=-1)
    longest = distances.max(-1)
    is_own = (longest > points.nearest[:, None]) & (longest < points.farthest[:, None])
    fits = is_near & (distances.min(-1) > 0) & is_own & present[:, None]
    smallest = jnp.argmin(jnp.where(fits, area(boxes), jnp.inf), axis=-1)
    return jnp.where(fits.any(-1), smallest, -1).astype(jnp.int32)


def mean_positives(points: Points, targets: Mapping[str, Array]) -> Float[Array, " batch"]:
    """The mean number of points with a box, over all images and repeated for each: what the losses are divided by.

    Counted over a whole batch, it makes the mean of the losses of its parts the loss of the batch.
    """
    matched = assign(points, targets["boxes"], targets["present"])
    count = jnp.maximum(1, (matched >= 0).sum()).astype(float)
    return jnp.broadcast_to(count / len(matched), (len(matched),))


def detection_losses(
    outputs: Mapping[str, Float[Array, "batch points _"]],
    targets: Mapping[str, Array],
    points: Points,
    positives: Float[Array, " batch"] | None = None,
) -> dict[str, Float[Array, ""]]:
    """The losses `classification`, `bbox_regression` and `bbox_ctrness`, whose sum is to be minimised.

    Args:
        outputs: of the detector; computed with in float32 or wider.
        targets: see above.
        points: the detector's, see `make_points`.
        positives: see `mean_positives`; by default that of these images.
    """
    real = jnp.promote_types(outputs["cls_logits"].dtype, jnp.float32)
    logits, distances, centreness = (outputs[name].astype(real) for name in _OUTPUTS)
    boxes = targets["boxes"].astype(real)
    xy, stride = (jnp.asarray(x, real) for x in (points.xy, points.stride))
    matched = assign(points, boxes, targets["present"])
    is_positive = matched >= 0
    total = jnp.maximum(1, is_positive.sum()).astype(real) if positives is None else positives.sum().astype(real)

    # sums over a row's boxes instead of look-ups: XLA fuses them, and a mesh may cut them
    is_matched = matched[..., None] == jnp.arange(boxes.shape[1])
    classes = jnp.where(is_matched, targets["classes"][:, None], 0).sum(-1)
    is_class = is_positive[..., None] & (classes[..., None] == jnp.arange(logits.shape[-1]))
    own = jnp.where(is_matched[..., None], boxes[:, None], 0).sum(-2)
    # where there is no box, any proper one, so that no gradient is NaN
    around = jnp.concatenate([xy - stride[:, None], xy + stride[:, None]], axis=-1)
    own = jnp.where(is_positive[..., None], own, around)

    def mean(losses: Array) -> Array:
        return jnp.where(is_positive, losses, 0).sum() / total

    return {
        "classification": focal_loss(logits, is_class).sum() / total,
        "bbox_regression": mean(giou_loss(decode(xy, stride, distances), own)),
        "bbox_ctrness": mean(binary_cross_entropy(centreness[..., 0], centreness_of(encode(xy, stride, own)))),
    }


_OUTPUTS = ("cls_logits", "bbox_regression", "bbox_ctrness")


def focal_loss(
    logits: Float[Array, "*shape"], is_class: Bool[Array, "*shape"], alpha: float = 0.25, gamma: int | float = 2
) -> Float[Array, "*shape"]:
    """Binary cross-entropy that weighs what is sure less (arXiv 1708.02002)."""
    signed = jnp.where(is_class, -logits, logits)
    return jnp.where(is_class, alpha, 1 - alpha) * jax.nn.sigmoid(signed) ** gamma * jax.nn.softplus(signed)


def binary_cross_entropy(logits: Float[Array, "*shape"], targets: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Of targets from 0 to 1."""
    return jax.nn.softplus(logits) - logits * targets


def centreness_of(distances: Float[Array, "*batch 4"]) -> Float[Array, "*batch"]:
    """How near a point is to the middle of its box, from 0 at a side to 1, by its distances to the sides."""
    one, other = distances[..., :2], distances[..., 2:]
    return jnp.sqrt((jnp.minimum(one, other) / jnp.maximum(one, other)).prod(-1))
