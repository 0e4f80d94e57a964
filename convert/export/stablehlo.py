"""The Flax model as a StableHLO program, which jax runs without this library."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Array, Float32

from convert.export.compare import Outputs, Run
from convert.models import flax_model
from convert.verify import run_flax
from convert.weights import Weights

PLATFORMS = ("cpu", "cuda", "tpu")


def stablehlo_program(weights: Weights, dtype: str = "float32", *, detect: bool = False) -> bytes:
    """The model as `jax.export` serialises it, weights inside; `jax.export.deserialize` reads it.

    The function takes images (batch, height, width, channels), ImageNet-normalised, of exactly the model's size, and
    returns logits (batch, classes), or features (batch, widths) without a head; of a segmenter logits (batch, height,
    width, classes); of a detector its raw outputs by name, see `CrossViTDetector`. All are float32 whatever `dtype` is,
    and the batch may have any size. It runs on all of `PLATFORMS`.

    Args:
        dtype: "float32", "float16" or "bfloat16": of the parameters and of what is computed; softmax, the statistics
            of norms and the resize between the branches stay in float32.
        detect: of a detector, what its `detect` returns.
    """
    config = weights.config
    model = flax_model(weights, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype))

    def crossvit(images: Float32[Array, "batch height width channels"]) -> Any:
        # float32 is meant: accelerators' default would round the operands of products to bfloat16 or TF32
        with jax.default_matmul_precision("highest" if dtype == "float32" else None):
            if detect:
                return model.detect(images)
            return jax.tree.map(lambda output: output.astype(jnp.float32), model(images))

    (batch,) = export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *config.image_size, config.in_chans), jnp.float32)
    return bytes(export.export(jax.jit(crossvit), platforms=PLATFORMS)(images).serialize())


def run_source(weights: Weights) -> Run:
    """The Flax model in full float32, as a function from images to outputs."""
    model = flax_model(weights)
    return lambda images: _as_numpy(run_flax(model, jnp.asarray(images)))


def run_stablehlo(path: Path) -> Run:
    """The program in a file, as a function from images (batch, height, width, channels) to outputs."""
    run = jax.jit(export.deserialize(bytearray(path.read_bytes())).call)
    return lambda images: _as_numpy(run(images))


def _as_numpy(outputs: Any) -> Outputs:
    """With the classes of pixels first, as in torch."""
    outputs = jax.tree.map(np.asarray, outputs)
    return np.moveaxis(outputs, -1, 1) if isinstance(outputs, np.ndarray) and outputs.ndim == 4 else outputs
