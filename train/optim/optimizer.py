"""AdamW and SGD as torch does them, with timm's choice of parameters that decay, and layer-wise learning rates."""

from collections.abc import Collection
from typing import Any

import jax
import optax

from train.config import TrainConfig
from train.optim.schedule import make_schedule

_Path = tuple[Any, ...]


def decay_mask(params: Any, no_weight_decay: Collection[str]) -> Any:
    """A tree of bools: which parameters decay. Biases, norms (at most one axis) and the named ones do not.

    timm's rule (timm/optim/_param_groups.py). IBM's code meant to spare tokens and position embeddings too, but
    its names never match.
    """
    return _map_with_path(
        lambda path, param: param.ndim > 1 and ".".join(map(str, path)) not in no_weight_decay, params
    )


def layer_index(path: _Path, depth: int, stages: int) -> int:
    """The layer that a parameter belongs to, from 0 at the image to stages * (depth + 1) + 1 at the heads.

    Embeddings are layer 0. In each stage, block i of either branch is a layer, and the fusion with its projections is
    one more. Final norms and heads are the last layer.

    Args:
        path: the keys from the root of the parameters: `("blocks", stage, "blocks", branch, i, ...)` in a block.
        depth: blocks of a stage's deeper branch.
    """
    if path[0] == "blocks":
        return 1 + path[1] * (depth + 1) + (path[4] if path[2] == "blocks" else depth)
    return stages * (depth + 1) + 1 if path[0] in ("norm", "head") else 0


def layer_scales(params: Any, decay: float) -> Any:
    """A tree of floats: each parameter's learning rate as a share of the heads' (BEiT's layer-wise decay).

    Each layer (see `layer_index`) has `decay` times the learning rate of the one above.
    """
    paths = [_keys(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    blocks = [path for path in paths if path[0] == "blocks"]
    stages = 1 + max((path[1] for path in blocks), default=-1)
    depth = 1 + max((path[4] for path in blocks if path[2] == "blocks"), default=-1)
    last = stages * (depth + 1) + 1
    return _map_with_path(lambda path, _: decay ** (last - layer_index(path, depth, stages)), params)


def make_optimizer(
    config: TrainConfig, *, steps_per_epoch: int, no_weight_decay: Collection[str] = ()
) -> optax.GradientTransformation:
    """The optimiser of a run, on its schedule.

    AdamW with betas 0.9 and 0.999, epsilon 1e-8 and decoupled decay (IBM main.py:58-69), or torch's SGD with Nesterov
    momentum (timm's "sgd"), whose decay is part of the gradient. The state has the parameters' dtype, so in float64
    the whole update is float64.

    Args:
        no_weight_decay: dotted names of parameters that do not decay, `model.no_weight_decay()`; heeded unless the
            settings want decay there too.
    """
    spared = () if config.decay_tokens else no_weight_decay
    decay = optax.add_decayed_weights(config.weight_decay, mask=lambda params: decay_mask(params, spared))
    parts = [] if config.clip_grad is None else [optax.clip_by_global_norm(config.clip_grad)]
    if config.optimizer == "adamw":
        parts += [optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8), decay]
    else:
        parts += [decay, optax.trace(config.momentum, nesterov=True)]
    if config.layer_decay < 1:
        parts.append(_scale_by_layer(config.layer_decay))
    return optax.chain(*parts, optax.scale_by_learning_rate(make_schedule(config, steps_per_epoch=steps_per_epoch)))


def _scale_by_layer(decay: float) -> optax.GradientTransformation:
    def scale(updates, params):
        return jax.tree.map(lambda update, factor: update * factor, updates, layer_scales(updates, decay))

    return optax.stateless(scale)


def _map_with_path(function, tree: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, leaf: function(_keys(path), leaf), tree)


def _keys(path) -> _Path:
    return tuple(entry.key for entry in path)
