"""Post-training quantisation with qwix: what a model trained with or without `--qat` computes with integer weights."""

import jax.numpy as jnp
from flax import nnx

from crossvit_jax import CrossViT
from train.optim.quantize import rules


def quantised(model: CrossViT, weights: str) -> CrossViT:
    """A copy of the model whose linear layers hold integers and their scales, and multiply integers.

    The same layers in the same way as in quantisation-aware training (see `train.optim.quantize`), so that it computes
    what the model computed in training.

    Args:
        model: in evaluation mode, with its arrays.
        weights: "int8" or "int4".
    """
    import qwix

    image = jnp.zeros((1, *model.config.image_size, model.config.in_chans))
    # qwix finds the weights to quantise by calling the model; of the call itself, the compiler leaves nothing
    return nnx.jit(lambda model: qwix.quantize_model(model, qwix.PtqProvider(rules(weights)), image))(model)
