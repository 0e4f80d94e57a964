"""What one side is asked to run, and what it offers to be timed. Imports no framework."""

import dataclasses
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from crossvit_jax.config import get_config
from train.config import TrainConfig
from train.recipes import RECIPES

# XLA's attention or cuDNN's; eager, torch.compile, and that with images and kernels channels last
SIDES = ("flax", "flax-cudnn", "timm", "timm-compile", "timm-channels-last")
GPU_WARM_UP_S = 1.0  # see `Program.warm_up_s`
CHECKED_STEPS = 2  # the loss of the second one also tells whether gradient and update were right
_DIFFERENT_IMAGES = 256  # in larger batches they come again: drawing thousands takes longer than the search


def default_sides(device: str, dtype: str) -> list[str]:
    """All that the device can run; on a CPU without channels last, which is meant for the convolutions of GPUs.

    cuDNN's attention is for half precision only.
    """
    if device == "cpu":
        return ["flax", "timm", "timm-compile"]
    return [side for side in SIDES if side != "flax-cudnn" or dtype == "bfloat16"]


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

    def load(self, side: str) -> "Program":
        """The program of a side. Imports its framework."""
        if side.startswith("flax"):
            from benchmarks.sides import flax as flax_side

            return flax_side.load(self, side)
        from benchmarks.sides import timm as timm_side

        return timm_side.load(self, side)

    def images(self) -> np.ndarray:
        """(batch, height, width, 3), float32: the same numbers in every process."""
        shape = (min(self.batch_size, _DIFFERENT_IMAGES), *get_config(self.variant).image_size, 3)
        different = np.random.default_rng(0).standard_normal(shape, np.float32)
        return np.resize(different, (self.batch_size, *shape[1:]))  # repeats them

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

    # What the sides must agree on: pixels, or of models a dict of arrays. These are `logits`; or, of unmixed training
    # steps, `losses`, and of each parameter the norm of what AdamW makes of its `gradients` (the first moment).
    check: Callable[[], Any]
    run: Callable[[int], None]  # that many calls; returns when the results are there
    facts: dict[str, str]  # versions, threads, device
    around: Callable[[], AbstractContextManager] = nullcontext  # what surrounds a round and is not timed
    close: Callable[[], None] = lambda: None  # ends the processes that it started
    rest: Callable[[], None] = lambda: None  # between its turns: leaves unused device memory, and cores, to others
    warm_up_s: float = 3.0  # on a CPU; by then a process has the memory that it needs
    peak_bytes: Callable[[], int | None] = lambda: None  # the most device memory in use so far; None on a CPU
    flops: Callable[[], int] | None = None  # of the model in a call: see `flops_per_image`
    peak_flops: Callable[[], float] | None = None  # measures the device's, see `benchmarks/peak.py`
    float32: Callable[[], Any] | None = None  # for a task in bfloat16: what `check` would give in float32
