"""Loss scaling for float16, as `torch.amp.GradScaler` does it: gradients that would be rounded to 0 are kept.

The loss is multiplied before its gradient is taken, and the gradient divided. Where that overflows, the step is skipped
and the factor halved; after many good steps it is doubled.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from train.tasks.task import Tree

_INITIAL, _GROWTH, _BACKOFF, _GROWTH_INTERVAL = 2.0**16, 2.0, 0.5, 2000  # GradScaler's defaults


class LossScale(NamedTuple):
    """Part of the training state."""

    factor: Array  # float32
    good_steps: Array  # int32, since the factor changed
    updates: Array  # int32, of the weights: all steps but those that were skipped


def initial_loss_scale() -> LossScale:
    """What a run begins with."""
    return LossScale(jnp.full((), _INITIAL, jnp.float32), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def all_finite(tree: Tree) -> Array:
    """Whether no number of a tree is infinite or NaN."""
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]).all()


def next_loss_scale(scale: LossScale, *, finite: Array) -> LossScale:
    """After a step whose gradients were finite, or were not."""
    good_steps = jnp.where(finite, scale.good_steps + 1, 0)
    grows = good_steps == _GROWTH_INTERVAL
    grown = scale.factor * _GROWTH
    factor = jnp.where(grows & jnp.isfinite(grown), grown, scale.factor)
    factor = jnp.where(finite, factor, scale.factor * _BACKOFF)
    return LossScale(factor, jnp.where(grows, 0, good_steps), scale.updates + jnp.where(finite, 1, 0))


def unless_skipped(new: Tree, old: Tree, *, finite: Array) -> Tree:
    """The new state, or after an overflow the old one; the count of the learning rate's schedule goes on, as torch's
    schedulers do."""

    def choose(new: Tree, old: Tree) -> Tree:
        if isinstance(new, optax.ScaleByScheduleState):
            return new
        return jnp.where(finite, new, old)

    return jax.tree.map(choose, new, old, is_leaf=lambda node: isinstance(node, optax.ScaleByScheduleState))
