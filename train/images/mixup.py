"""Mixup and CutMix as timm does them (timm/data/mixup.py, mode "batch"), on the device, inside the train step.

What is drawn (`draw_mix`) is apart from what is done with it (`mix_images`, `mix_targets`): with the same draws the
pixels and targets are timm's. Each image is mixed with its partner, the image at the same place of the reversed batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from train.config import TrainConfig


class Mix(NamedTuple):
    """How one batch is mixed."""

    lam: Float[Array, ""]  # share of the image itself, in pixels and in targets
    box: Int[Array, "4"]  # top, bottom, left, right of what CutMix takes from the partner; lower ends inclusive
    cut: Bool[Array, ""]  # CutMix rather than Mixup


def cutmix_box(
    lam: Float[Array, ""], center: Int[Array, "2"], height: int, width: int
) -> tuple[Int[Array, "4"], Float[Array, ""]]:
    """The box around a centre that covers 1 - lam of an image, clipped to it, and lam recomputed from what is left.

    timm's `rand_bbox` and `cutmix_bbox_and_lam`.
    """
    cut = (jnp.array([height, width]) * jnp.sqrt(1 - lam)).astype(jnp.int32)
    size = jnp.array([height, width])
    low = jnp.clip(center - cut // 2, 0, size)
    high = jnp.clip(center + (cut + 1) // 2, 0, size)
    area = jnp.prod(high - low)
    return jnp.stack([low[0], high[0], low[1], high[1]]), 1 - area / (height * width)


def draw_mix(key: Key[Array, ""], config: TrainConfig, *, height: int, width: int) -> Mix:
    """Draw whether and how to mix a batch: timm's `Mixup._params_per_batch`, and the box."""
    if config.mixup == config.cutmix == 0:
        return Mix(lam=jnp.ones(()), box=jnp.zeros(4, jnp.int32), cut=jnp.zeros((), bool))
    mixed_key, cut_key, mixup_key, cutmix_key, center_key = jax.random.split(key, 5)
    cutmix_share = 0.0 if config.cutmix == 0 else 1.0 if config.mixup == 0 else config.cutmix_share
    mixed = jax.random.bernoulli(mixed_key, config.mix_prob)
    cut = mixed & jax.random.bernoulli(cut_key, cutmix_share)
    # where one of them is off, its alpha is not used; 1 keeps the draw defined
    mixup_lam, cutmix_lam = (
        jax.random.beta(lam_key, alpha or 1.0, alpha or 1.0)
        for lam_key, alpha in ((mixup_key, config.mixup), (cutmix_key, config.cutmix))
    )
    center = jax.random.randint(center_key, (2,), 0, jnp.array([height, width]))
    box, cutmix_lam = cutmix_box(cutmix_lam, center, height, width)
    lam = jnp.where(mixed, jnp.where(cut, cutmix_lam, mixup_lam), 1.0)
    return Mix(lam=lam, box=box, cut=cut)


def mix_images(
    images: Float[Array, "batch height width channels"], mix: Mix
) -> Float[Array, "batch height width channels"]:
    """Images blended with their partners (Mixup) or with a box of theirs pasted in (CutMix). Keeps shape and dtype.

    What an image takes nothing of leaves no trace in it, not even NaN or infinity.
    """
    rows, columns = jnp.arange(images.shape[1])[:, None], jnp.arange(images.shape[2])[None]
    top, bottom, left, right = mix.box
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    partners, lam = images[::-1], mix.lam.astype(images.dtype)
    blended = jnp.where(mix.lam == 1, images, images * lam + partners * (1 - lam))
    return jnp.where(mix.cut, jnp.where(inside[None, :, :, None], partners, images), blended)


def mix_targets(
    labels: Int[Array, " batch"], lam: Float[Array, ""], *, num_classes: int, smoothing: float
) -> Float[Array, "batch classes"]:
    """Smoothed one-hot targets (on 1 - s + s/classes, off s/classes), blended like the images."""
    off = smoothing / num_classes
    targets = jax.nn.one_hot(labels, num_classes, dtype=lam.dtype) * (1.0 - smoothing) + off
    return targets * lam + targets[::-1] * (1 - lam)
