"""What a model's arithmetic amounts to, as a yardstick that is the same for every side."""

import jax
import jax.numpy as jnp
from flax import nnx

from crossvit_jax import CrossViT
from crossvit_jax.config import get_config
from train.cost.flops import matrix_flops


def flops_per_image(variant: str, *, training: bool) -> int:
    """FLOPs of matrix products and convolutions, two per multiply-add: forward, and in training the gradient as well.

    Cross-attention counts in the order of computation that needs least, ours. What is no product by nature does not
    count: the resize, two matrices on our side. Nor does what a side computes again for its gradient.
    """
    # a crop takes the place of the resize; dropout asks for the plain attention, whose gradient computes nothing again
    config = get_config(variant, crop_scale=True, attn_drop_rate=0.5)
    model = nnx.eval_shape(lambda: CrossViT(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    images = jax.ShapeDtypeStruct((1, *config.image_size, config.in_chans), jnp.float32)

    def total(params, images):
        return nnx.merge(graphdef, params)(images, rngs=nnx.Rngs(dropout=jax.random.key(0))).sum()

    program = jax.make_jaxpr(jax.grad(total) if training else total)(nnx.to_pure_dict(state), images)
    return matrix_flops(program)
