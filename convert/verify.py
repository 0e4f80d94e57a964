"""Whether what was written is what was meant, and whether both twins make the same of it."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float

from convert.models import flax_model, load_weights, torch_model
from convert.weights import Weights
from crossvit_jax.config import VARIANTS

BOUND = 1e-5  # of the largest logit: the project's for float32


def read_back(weights: Weights, path: Path) -> tuple[Weights, list[str]]:
    """The weights at `path`, and the names of the tensors that are not bit for bit those of `weights`."""
    # a .pth file cannot tell the size of a rectangle, nor the heads of a model that is no variant
    branches = {} if weights.config.name in VARIANTS else {"branches": weights.config.branches}
    written = load_weights(path, image_size=weights.config.image_size, **branches)
    names = [*weights.tensors, *(name for name in written.tensors if name not in weights.tensors)]
    return written, [name for name in names if not _same(weights.tensors.get(name), written.tensors.get(name))]


def largest_difference(weights: Weights, *, images: int = 2, seed: int = 0) -> float:
    """The largest difference of what the twins return on random images in float32, relative to the largest value.

    Not a number where that is not finite.
    """
    import torch

    config = weights.config
    shape = (images, *config.image_size, config.in_chans)
    batch = np.random.default_rng(seed).standard_normal(shape, np.float32)
    of_flax = run_flax(flax_model(weights), jnp.asarray(batch))
    with torch.inference_mode():
        of_torch = torch_model(weights)(torch.from_numpy(batch).permute(0, 3, 1, 2))
    # a detector has several outputs, by name; a segmenter's are a map, whose channels torch has first
    if not isinstance(of_torch, dict):
        of_flax, of_torch = {"": of_flax}, {"": of_torch if of_torch.ndim < 4 else of_torch.permute(0, 2, 3, 1)}
    pairs = [(np.asarray(of_flax[name]), x.numpy()) for name, x in of_torch.items()]
    with np.errstate(invalid="ignore"):
        return max(float(np.abs(flax - torch).max() / np.abs(torch).max()) for flax, torch in pairs)


@nnx.jit  # eager execution would compile every operation on its own, which takes longer
def run_flax(model: nnx.Module, images: Float[Array, "batch height width channels"]) -> Any:
    """What the model returns, computed in full float32."""
    with jax.default_matmul_precision("highest"):  # accelerators' default rounds to bfloat16 or TF32
        return model(images)


def _same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    """Equal bit for bit, so that NaN equals NaN."""
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
        return False
    bits = np.dtype(f"u{a.dtype.itemsize}")
    return np.array_equal(a.view(bits), b.view(bits))
