"""AdamW and SGD as torch does them, with timm's choice of parameters that decay, and layer-wise learning rates."""

from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax

from train.config import TrainConfig
from train.optim.schedule import make_schedule, weight_decay_schedule


def decay_mask(params: Any, no_weight_decay: Collection[str]) -> Any:
    """A tree of bools: which parameters decay. Biases, norms (at most one axis) and the named ones do not.

    timm's rule (timm/optim/_param_groups.py). IBM's code meant to spare tokens and position embeddings too, but
    its names never match.
    """
    return _map_with_path(lambda name, param: param.ndim > 1 and name not in no_weight_decay, params)


def layer_scales(params: Any, decay: float, layer_of: Callable[[str], int]) -> Any:
    """A tree of floats: each parameter's learning rate as a share of the last layer's (BEiT's layer-wise decay).

    Each layer has `decay` times the learning rate of the one above.

    Args:
        layer_of: the layer of a parameter by its dotted name, the model's `layer_of`.
    """
    layers = _map_with_path(lambda name, _: layer_of(name), params)
    last = max(jax.tree.leaves(layers))
    return jax.tree.map(lambda layer: decay ** (last - layer), layers)


def make_optimizer(
    config: TrainConfig,
    *,
    steps_per_epoch: int,
    no_weight_decay: Collection[str] = (),
    layer_of: Callable[[str], int] | None = None,
) -> optax.GradientTransformation:
    """The optimiser of a run, on its schedule.

    AdamW with betas 0.9 and 0.999, epsilon 1e-8 and decoupled decay (IBM main.py:58-69), or torch's SGD with Nesterov
    momentum (timm's "sgd"), whose decay is part of the gradient. The state has the parameters' dtype, so in float64
    the whole update is float64.

    Args:
        no_weight_decay: dotted names of parameters that do not decay, `model.no_weight_decay()`; heeded unless the
            settings want decay there too.
        layer_of: see `layer_scales`; needed for `config.layer_decay` below 1.
    """
    spared = () if config.decay_tokens else no_weight_decay
    rate = config.weight_decay
    if config.weight_decay_end is not None:
        rate = weight_decay_schedule(config, steps_per_epoch=steps_per_epoch)
    decay = optax.add_decayed_weights(rate, mask=lambda params: decay_mask(params, spared))
    parts = [] if config.clip_grad is None else [_clip_by_norm(config.clip_grad)]
    if config.optimizer == "adamw":
        parts += [optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8), decay]
    else:
        parts += [decay, optax.trace(config.momentum, nesterov=True)]
    if config.layer_decay < 1:
        parts.append(_scale_by_layer(config.layer_decay, layer_of))
    return optax.chain(*parts, optax.scale_by_learning_rate(make_schedule(config, steps_per_epoch=steps_per_epoch)))


def _clip_by_norm(largest: float) -> optax.GradientTransformation:
    """torch's `clip_grad_norm_`: the norm is taken for 1e-6 larger than it is."""

    def clip(gradients, params):
        factor = jnp.minimum(1, largest / (optax.tree.norm(gradients) + 1e-6))
        return jax.tree.map(lambda gradient: gradient * factor, gradients)

    return optax.stateless(clip)


def _scale_by_layer(decay: float, layer_of: Callable[[str], int]) -> optax.GradientTransformation:
    def scale(updates, params):
        return jax.tree.map(lambda update, factor: update * factor, updates, layer_scales(updates, decay, layer_of))

    return optax.stateless(scale)


def _map_with_path(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """`function` of each leaf's dotted name and the leaf."""
    return jax.tree.map_with_path(lambda path, leaf: function(".".join(str(entry.key) for entry in path), leaf), tree)
