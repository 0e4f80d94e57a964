"""The learning rate: linear warm-up, then a cosine, a line or a constant, exactly as timm's schedulers give it; and
DINO's weight decay."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64

from crossvit_jax.pretraining.dino import cosine_between
from train.config import TrainConfig


def schedule_value(t: Any, config: TrainConfig, *, updates_per_epoch: int = 1) -> Any:
    """The schedule at update t, or at each of an array of updates (numpy's arithmetic, or jax's for jax arrays).

    timm's `CosineLRScheduler`, or `PolyLRScheduler` with power 1: after the warm-up they go on as if there had been
    none (timm/scheduler/cosine_lr.py:81, poly_lr.py:76).
    """
    xp = jnp if isinstance(t, jax.Array) else np
    base, start, minimum = config.peak_lr, config.warmup_lr, config.min_lr
    # floats: the updates of an epoch without end would be no int32
    warmup, total = float(config.warmup_epochs * updates_per_epoch), float(config.epochs * updates_per_epoch)
    rising = start + t * ((base - start) / max(1, warmup))
    if config.lr_schedule == "constant":
        return xp.where(t < warmup, rising, base)
    if config.lr_schedule == "linear":
        falling = minimum + (base - minimum) * (1 - t / total)
    else:
        falling = minimum + 0.5 * (base - minimum) * (1 + xp.cos(np.pi * t / total))
    return xp.where(t < warmup, rising, xp.where(t < total, falling, minimum))


def learning_rates(config: TrainConfig) -> Float64[np.ndarray, " epochs"]:
    """The learning rate that each epoch of a run trains at, where it changes with the epoch.

    timm's train.py calls `step(epoch + 1)` after an epoch, so that epoch e trains at the schedule's value e. IBM's
    main.py calls `step(epoch)`: each epoch after the first trains at the value before, and epochs 0 and 1 at the same.
    """
    delay = 1 if config.lr_stepping == "epoch-late" else 0
    return schedule_value(np.maximum(0, np.arange(config.epochs, dtype=np.float64) - delay), config)


def make_schedule(config: TrainConfig, *, steps_per_epoch: int) -> Callable[[Any], Any]:
    """The learning rate as a function of the steps done, a jax scalar (as optax wants it)."""
    if config.lr_stepping == "step":
        return lambda step: schedule_value(jnp.asarray(step), config, updates_per_epoch=steps_per_epoch)
    per_epoch = learning_rates(config)  # a table: its values are rounded once, from float64

    def lookup(step):
        # As a sum, because XLA computes a reduction once. A lookup by index it would do again for each parameter, in
        # the kernel that takes the optimiser's step: an eighth of a compiled step of Ti, read at every start.
        epoch = jnp.minimum(step // steps_per_epoch, len(per_epoch) - 1)
        return jnp.sum(jnp.where(jnp.arange(len(per_epoch)) == epoch, per_epoch, 0))

    return lookup


def weight_decay_schedule(config: TrainConfig, *, steps_per_epoch: int) -> Callable[[Any], Any]:
    """The weight decay as a function of the steps done: along a cosine, as DINO's `cosine_scheduler`."""
    total = float(config.epochs * steps_per_epoch)
    return lambda step: cosine_between(config.weight_decay, config.weight_decay_end, jnp.asarray(step) / total)


def learning_rate(config: TrainConfig, step: int, *, steps_per_epoch: int) -> float:
    """The learning rate of the step after `step` steps, in float64, to be told to the user."""
    if config.lr_stepping == "step":
        return float(schedule_value(np.float64(step), config, updates_per_epoch=steps_per_epoch))
    return float(learning_rates(config)[step // steps_per_epoch])
