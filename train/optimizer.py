"""AdamW as the recipe wants it: torch's update, with timm's choice of parameters that decay."""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax

from train.config import TrainConfig
from train.schedule import learning_rates


def decay_mask(params: Any, no_weight_decay: Collection[str]) -> Any:
    """A tree of bools: which parameters decay. Biases, norms (at most one axis) and the named ones do not.

    timm's rule (timm/optim/_param_groups.py). IBM's code meant to spare tokens and position embeddings too, but
    its names never match.
    """

    def decays(path, param) -> bool:
        name = ".".join(str(entry.key) for entry in path)
        return param.ndim > 1 and name not in no_weight_decay

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(
    config: TrainConfig, *, steps_per_epoch: int, no_weight_decay: Collection[str] = ()
) -> optax.GradientTransformation:
    """AdamW (betas 0.9 and 0.999, epsilon 1e-8, no clipping; IBM main.py:58-69) on the run's schedule.

    The moments have the parameters' dtype, so in float64 the whole update is float64. The learning rate is constant
    within an epoch and looked up by the step that the optimiser state counts.

    Args:
        steps_per_epoch: steps after which the schedule moves on.
        no_weight_decay: dotted names of parameters that do not decay, `model.no_weight_decay()`.
    """
    per_epoch = learning_rates(config)

    def learning_rate(step):
        epoch = jnp.minimum(step // steps_per_epoch, len(per_epoch) - 1)
        return jnp.asarray(per_epoch)[epoch]

    return optax.adamw(
        learning_rate,
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=config.weight_decay,
        mask=lambda params: decay_mask(params, no_weight_decay),
    )
