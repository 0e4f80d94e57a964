"""What one side is asked to run, and what it offers to be timed. Imports no framework."""

import dataclasses
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from crossvit_jax.config import get_config
from train.config import RECIPES, TrainConfig

FLAX_SIDES = ("flax", "flax-cudnn")
TIMM_SIDES = ("timm", "timm-compile", "timm-channels-last")
SIDES = FLAX_SIDES + TIMM_SIDES
CHECKED_STEPS = 2  # the loss of the second one also tells whether gradient and update were right


def usable_cores() -> int:
    """Those that this process may use; XLA has a thread for each."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@dataclass(frozen=True, kw_only=True)
class Task:
    """One model, batch and precision; every side gets the same."""

    benchmark: str  # inference or training
    variant: str
    batch_size: int
    dtype: str  # float32 or bfloat16
    device: str  # cpu or gpu
    weights: str  # a safetensors file with timm's names
    attention: str = "xla"  # or cudnn: what Flax's self-attention runs on; torch chooses by itself

    def load(self, side: str) -> "Program":
        """The program of a side. Imports its framework."""
        if side == "flax":
            from benchmarks import flax_side

            return flax_side.load(self)
        from benchmarks import timm_side

        return timm_side.load(self, compiled=side == "timm-compile")

    def images(self) -> np.ndarray:
        """(batch, height, width, 3), float32: the same numbers in every process."""
        shape = (self.batch_size, *get_config(self.variant).image_size, 3)
        return np.random.default_rng(0).standard_normal(shape, np.float32)

    def labels(self) -> np.ndarray:
        """(batch,), int32."""
        return np.random.default_rng(1).integers(1000, size=self.batch_size, dtype=np.int32)

    def recipe(self) -> TrainConfig:
        """The paper's loss, mixing and decay, at a small constant learning rate: random images teach nothing.

        Odd batches are not mixed: timm mixes images in pairs.
        """
        mixing = {"mixup": 0.0, "cutmix": 0.0} if self.batch_size % 2 else {}
        return dataclasses.replace(
            RECIPES["imagenet"],
            **mixing,
            batch_size=self.batch_size,
            lr_batch_size=self.batch_size,
            lr=1e-4,
            warmup_epochs=0,
            drop_path=0.0,
        )


@dataclass(frozen=True)
class Program:
    """A task, loaded and ready on one side."""

    check: Callable[[], Any]  # what the sides must agree on: logits, losses of unmixed steps, or pixels
    run: Callable[[int], None]  # that many calls; returns when the results are there
    facts: dict[str, str]  # versions, threads, device
    around: Callable[[], AbstractContextManager] = nullcontext  # what surrounds a round and is not timed
    close: Callable[[], None] = lambda: None  # ends the processes that it started
