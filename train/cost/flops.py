"""The arithmetic of a traced program: what has to be computed, whatever the compiler makes of it."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from convert.architecture import abstract_model
from crossvit_jax import CrossViTConfig


def macs_per_image(config: CrossViTConfig) -> int:
    """Multiply-adds of a classifier's matrix products and convolutions for one image.

    The resize between the branches, which is no product by nature, does not count.
    """
    return flops_per_image(config) // 2


def flops_per_image(config: CrossViTConfig, *, gradient: bool = False) -> int:
    """FLOPs of a classifier's matrix products and convolutions for one image, two per multiply-add.

    Cross-attention counts in the order of computation that needs least. What a program computes again for its gradient
    does not count, nor does the resize.

    Args:
        gradient: the forward pass and the gradient of the parameters.
    """
    # a crop takes the place of the resize; dropout asks for the plain attention, whose gradient computes nothing again
    config = dataclasses.replace(config, crop_scale=True, attn_drop_rate=0.5 * gradient)
    graphdef, params = abstract_model(config)
    images = jax.ShapeDtypeStruct((1, *config.image_size, config.in_chans), jnp.float32)

    def forward(params: Any, images: Any) -> Any:
        model = nnx.merge(graphdef, params)
        if gradient:
            return model(images, rngs=nnx.Rngs(dropout=jax.random.key(0))).sum()
        model.eval()
        return model(images)

    return matrix_flops(jax.make_jaxpr(jax.grad(forward) if gradient else forward)(params, images))


def matrix_flops(program: ClosedJaxpr | Jaxpr) -> int:
    """FLOPs of a program's matrix products and convolutions, two per multiply-add, over all devices together.

    Loops count as often as they run, a choice as its dearest branch. What gradient checkpointing or attention's
    gradient computes again counts again. Everything else (norms, softmax, GELU, the optimiser) is left out, as is
    usual; it is a percent or two.
    """
    return sum(_flops(equation) for equation in getattr(program, "jaxpr", program).eqns)


# cuDNN's fused attention is one operation; how many matrix products that is, the backward pass with the scores again
_ATTENTION = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}


def _flops(equation: JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        outputs = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        # a dilated input is zeros but for every so many places (the gradient of a strided convolution)
        taps = kernel.size // outputs // math.prod(params["lhs_dilation"])
        return 2 * equation.outvars[0].aval.size * taps // params["batch_group_count"]
    if products := _ATTENTION.get(name):
        queries, keys = (operand.aval for operand in equation.invars[:2])  # (batch, tokens, heads, width)
        return products * 2 * queries.size * keys.shape[1]
    inner = [matrix_flops(program) for program in _programs(params.values())]
    if name == "cond":
        return max(inner)
    times = 1
    if name == "scan":
        times = params["length"]
    elif name == "shard_map":  # what one device does
        times = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    elif name == "pallas_call":
        times = math.prod(params["grid_mapping"].grid)
    return sum(inner) * times


def _programs(values: Any) -> Iterator[ClosedJaxpr | Jaxpr]:
    for value in values:
        if isinstance(value, ClosedJaxpr | Jaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from _programs(value)
