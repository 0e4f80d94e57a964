"""The learning rate of every epoch: linear warm-up, then a cosine, exactly as timm's `CosineLRScheduler` gives it."""

import math

import numpy as np
from jaxtyping import Float64

from train.config import TrainConfig


def cosine_lr(epoch: int, *, base: float, minimum: float, epochs: int, warmup_epochs: int, warmup_lr: float) -> float:
    """The schedule's value at one epoch (timm/scheduler/cosine_lr.py:81). The cosine is not shifted by the warm-up."""
    if epoch < warmup_epochs:
        return warmup_lr + epoch * ((base - warmup_lr) / warmup_epochs)
    if epoch >= epochs:
        return minimum
    return minimum + 0.5 * (base - minimum) * (1 + math.cos(math.pi * epoch / epochs))


def learning_rates(config: TrainConfig) -> Float64[np.ndarray, " epochs"]:
    """The learning rate that each epoch of a run trains at.

    timm's train.py calls `step(epoch + 1)` after an epoch, so that epoch e trains at the schedule's value e. IBM's
    main.py calls `step(epoch)`: each epoch after the first trains at the value before, and epochs 0 and 1 at the same.
    """
    delay = {"timm": 0, "ibm": 1}[config.lr_stepping]
    values = [
        cosine_lr(
            max(0, epoch - delay),
            base=config.peak_lr,
            minimum=config.min_lr,
            epochs=config.epochs,
            warmup_epochs=config.warmup_epochs,
            warmup_lr=config.warmup_lr,
        )
        for epoch in range(config.epochs)
    ]
    return np.array(values, dtype=np.float64)
