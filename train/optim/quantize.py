"""Quantisation with qwix: which products are quantised, how a model trains with that, and how it computes afterwards.

Quantised are the linear layers of the transformer: their weights to int8 or int4 with a scale for each output, what
they multiply to int8 with a scale for each token, found anew for every batch. All else stays as it is: convolutions,
the image resize, norms, attention's scores and weighted sums (among them the key and value projections of
cross-attention, which fold into these), and the heads, which are small and decide.
"""

from typing import TYPE_CHECKING

import jax.numpy as jnp
from flax import nnx

from convert.errors import require
from crossvit_jax import CrossViT
from crossvit_jax.blocks import Block
from crossvit_jax.layers import Linear

if TYPE_CHECKING:
    import qwix

_LAYERS = r"blocks/.*/(qkv|q|kv|wq|proj|fc1|fc2|(revert_)?projs/\d+/\d+)"  # paths as qwix has them


def require_qwix(flag: str) -> None:
    """Raises MissingExtra, naming the flag that needs it, if qwix is not installed."""
    require(flag, "qwix")


def rules(weights: str) -> "list[qwix.QtRule]":
    """The rules of qwix for weights in `weights`: "int8" or "int4"."""
    import qwix

    rule = qwix.QtRule(
        module_path=_LAYERS,
        op_names=("dot_general",),
        weight_qtype=jnp.dtype(weights),
        act_qtype=jnp.int8,
        # the gradient is that of the rounded operands; by itself, qwix rounds them forwards only
        additional_qt_config={"use_original_residuals": False},
    )
    return [rule]


def fake_quantised(model: CrossViT, weights: str) -> CrossViT:
    """A copy of the model whose linear layers round their operands as they multiply; gradients pass straight through.

    Its parameters are those of the model, in float32, by the same names.

    Args:
        model: with arrays or only their shapes.
        weights: "int8" or "int4".
    """
    import qwix

    # qwix would call the model to find the scales of activations, but here these belong to a batch
    return qwix.quantize_model(_narrow(model), qwix.QtProvider(rules(weights)), skip_nnx_init=True)


def quantised(model: CrossViT, weights: str) -> CrossViT:
    """A copy of the model whose linear layers hold integers and their scales, and multiply integers.

    The same layers in the same way as in quantisation-aware training, so that it computes what the model
    computed in training.

    Args:
        model: in evaluation mode, with its arrays.
        weights: "int8" or "int4".
    """
    import qwix

    image = jnp.zeros((1, *model.config.image_size, model.config.in_chans))
    # qwix finds the weights to quantise by calling the model; of the call itself, the compiler leaves nothing
    return nnx.jit(lambda model: qwix.quantize_model(model, qwix.PtqProvider(rules(weights)), image))(_narrow(model))


def _narrow(model: CrossViT) -> CrossViT:
    """A copy whose linear layers return the model's own precision, and are all called: qwix knows no others."""
    model = nnx.merge(*nnx.split(model))
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Linear):
            module.set_wide(False)
        if isinstance(module, Block) and module.mlp.fc1.tokens_last:
            module.set_attention("xla")
    return model
