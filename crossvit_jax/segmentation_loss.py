"""Losses of semantic segmentation. Labels are (batch, height, width), whole numbers; 255 counts nowhere."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

IGNORED = 255


def mean_valid_pixels(labels: Integer[Array, "batch height width"]) -> Float[Array, " batch"]:
    """The mean number of pixels that count, over all images and repeated for each.

    Counted over a whole batch, it makes the mean of the cross-entropies of its parts that of the batch.
    """
    count = jnp.maximum(1, (labels != IGNORED).sum()).astype(float)
    return jnp.broadcast_to(count / len(labels), (len(labels),))


def cross_entropy(
    logits: Float[Array, "batch height width classes"],
    labels: Integer[Array, "batch height width"],
    valid_pixels: Float[Array, " batch"] | None = None,
) -> Float[Array, ""]:
    """The mean cross-entropy over the pixels that count, in float32 or wider.

    Args:
        valid_pixels: see `mean_valid_pixels`; by default that of these images.
    """
    real = jnp.promote_types(logits.dtype, jnp.float32)
    # one-hot products instead of look-ups, whose gradient XLA would fold for seconds on a CPU
    losses = -(jax.nn.log_softmax(logits.astype(real)) * _one_hot(labels, logits.shape[-1], real)).sum()
    if valid_pixels is None:
        return losses / jnp.maximum(1, (labels != IGNORED).sum()).astype(real)
    return losses / valid_pixels.sum().astype(real)


def dice_loss(
    logits: Float[Array, "batch height width classes"],
    labels: Integer[Array, "batch height width"],
    epsilon: float = 1e-7,
) -> Float[Array, ""]:
    """1 - the Dice coefficient of each class over all images, as a mean over all classes, in float32 or wider.

    A class that no pixel has counts as 0, as in segmentation-models-pytorch.
    """
    real = jnp.promote_types(logits.dtype, jnp.float32)
    targets = _one_hot(labels, logits.shape[-1], real)
    shares = jax.nn.softmax(logits.astype(real)) * (labels != IGNORED)[..., None]
    pixels = (0, 1, 2)
    shared, both = (shares * targets).sum(pixels), (shares + targets).sum(pixels)
    losses = 1 - 2 * shared / jnp.maximum(both, epsilon)
    return jnp.where(targets.any(pixels), losses, 0).mean()


def _one_hot(labels: Integer[Array, "batch height width"], classes: int, dtype) -> Float[Array, "batch height width _"]:
    """All zeros where the label is ignored."""
    return (labels[..., None] == jnp.arange(classes)).astype(dtype)
