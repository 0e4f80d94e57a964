"""A yardstick that is the same for every side: FLOPs of a model, and the most that a device reaches in a second."""

import math
import time
from collections.abc import Callable
from typing import Any

from crossvit_jax.config import get_config

PRODUCT = {"cpu": 2048, "gpu": 8192}  # rows and columns of both factors
_AT_ONCE = {"cpu": 1, "gpu": 20}  # products between two looks at the clock
_SECONDS = 1.0


def flops_per_image(variant: str, *, training: bool) -> int:
    """FLOPs of matrix products and convolutions, two per multiply-add: forward, and in training the gradient as well.

    Cross-attention counts in the order of computation that needs least, ours. What is no product by nature does not
    count: the resize, two matrices on our side. Nor does what a side computes again for its gradient.
    """
    import jax  # here: the processes of timm's sides measure the peak without jax
    import jax.numpy as jnp
    from flax import nnx

    from crossvit_jax import CrossViT
    from train.cost.flops import matrix_flops

    # a crop takes the place of the resize; dropout asks for the plain attention, whose gradient computes nothing again
    config = get_config(variant, crop_scale=True, attn_drop_rate=0.5)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: CrossViT(config, rngs=nnx.Rngs(0))))
    images = jax.ShapeDtypeStruct((1, *config.image_size, config.in_chans), jnp.float32)

    def total(params, images):
        return nnx.merge(graphdef, params)(images, rngs=nnx.Rngs(dropout=jax.random.key(0))).sum()

    return matrix_flops(jax.make_jaxpr(jax.grad(total) if training else total)(nnx.to_pure_dict(state), images))


def peak_flops(device: str, multiply: Callable[[], Any], wait: Callable[[Any], Any]) -> float:
    """FLOPs per second, two per multiply-add, of the fastest of the products that fill a second.

    Args:
        device: cpu or gpu.
        multiply: begins to compute a product of two matrices of random numbers, `PRODUCT[device]` on each side.
        wait: returns when that product is there.
    """
    wait(multiply())  # compiles
    fastest, end = math.inf, time.perf_counter() + _SECONDS
    while time.perf_counter() < end or fastest == math.inf:
        start = time.perf_counter()
        for _ in range(_AT_ONCE[device]):
            product = multiply()
        wait(product)
        fastest = min(fastest, (time.perf_counter() - start) / _AT_ONCE[device])
    return 2 * PRODUCT[device] ** 3 / fastest
