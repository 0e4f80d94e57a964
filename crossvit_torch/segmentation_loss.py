"""Losses of semantic segmentation. Labels are (batch, height, width), whole numbers; 255 counts nowhere."""

import torch
from jaxtyping import Float, Integer
from torch import Tensor

IGNORED = 255


def mean_valid_pixels(labels: Integer[Tensor, "batch height width"]) -> Float[Tensor, " batch"]:
    """The mean number of pixels that count, over all images and repeated for each.

    Counted over a whole batch, it makes the mean of the cross-entropies of its parts that of the batch.
    """
    count = (labels != IGNORED).sum().clamp(min=1).double()
    return (count / len(labels)).expand(len(labels))


def cross_entropy(
    logits: Float[Tensor, "batch classes height width"],
    labels: Integer[Tensor, "batch height width"],
    valid_pixels: Float[Tensor, " batch"] | None = None,
) -> Float[Tensor, ""]:
    """The mean cross-entropy over the pixels that count, in float32 or wider.

    Args:
        valid_pixels: see `mean_valid_pixels`; by default that of these images.
    """
    real = torch.promote_types(logits.dtype, torch.float32)
    losses = -(logits.to(real).log_softmax(1) * _one_hot(labels, logits.shape[1], real)).sum()
    if valid_pixels is None:
        return losses / (labels != IGNORED).sum().clamp(min=1).to(real)
    return losses / valid_pixels.sum().to(real)


def dice_loss(
    logits: Float[Tensor, "batch classes height width"],
    labels: Integer[Tensor, "batch height width"],
    epsilon: float = 1e-7,
) -> Float[Tensor, ""]:
    """1 - the Dice coefficient of each class over all images, as a mean over all classes, in float32 or wider.

    A class that no pixel has counts as 0, as in segmentation-models-pytorch.
    """
    real = torch.promote_types(logits.dtype, torch.float32)
    targets = _one_hot(labels, logits.shape[1], real)
    shares = logits.to(real).softmax(1) * (labels != IGNORED)[:, None]
    pixels = (0, 2, 3)
    shared, both = (shares * targets).sum(pixels), (shares + targets).sum(pixels)
    losses = 1 - 2 * shared / both.clamp(min=epsilon)
    return torch.where(targets.sum(pixels) > 0, losses, 0).mean()


def _one_hot(
    labels: Integer[Tensor, "batch height width"], classes: int, dtype
) -> Float[Tensor, "batch _ height width"]:
    """All zeros where the label is ignored."""
    return (labels[:, None] == torch.arange(classes, device=labels.device)[:, None, None]).to(dtype)
