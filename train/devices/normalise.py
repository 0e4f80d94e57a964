"""Pixels as the model takes them, on the devices: batches that nothing else is done to travel there as uint8."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, UInt8

from crossvit_jax.preprocess import MEAN, STD


def normalise(pixels: UInt8[Array, "*batch height width 3"]) -> Float32[Array, "*batch height width 3"]:
    """As `crossvit_jax.preprocess.normalised`, up to float32's rounding."""
    return (pixels.astype(jnp.float32) / 255 - np.float32(MEAN)) / np.float32(STD)


def normalise_batch(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """A batch with its `image` as normalised float32, if that is uint8; others are normalised already."""
    image = batch["image"]
    return {**batch, "image": normalise(image)} if image.dtype == jnp.uint8 else batch
