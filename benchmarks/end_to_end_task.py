"""What the sides of the end-to-end benchmark are asked to do: train on photographs from disk. Imports no framework."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.data_task import DataTask
from benchmarks.task import Program, Task
from convert.paths import FOLDER_PREFIX
from crossvit_jax.config import get_config
from train.config import TrainConfig

FLAX_STEPS, TIMM_STEPS = ("flax", "flax-cudnn"), ("timm", "timm-compile")  # sides of the training benchmark
FLAX_FED, TIMM_FED = {"flax-device": "device", "flax-host": "host"}, "timm-loader"  # ours by where they augment
CLASSES = 10  # of the photographs; the model has its thousand
_DIFFERENT = 256  # photographs
_STEPS, _STEPS_PER_WORKER = 8, 4  # in a call, at least
_BLACK, _WHITE = -2.118, 2.641  # of the darkest and the brightest channel, normalised as for ImageNet
_DARK, _BRIGHT = -1.0, 1.0  # which photographs pass in both directions
_ERASED = 0.02  # largest share of values beyond black and white: normal noise, in part of some images


def write_photographs(folder: Path, count: int) -> None:
    """So many JPEG files of the size of ImageNet's, in the class folders of `folder/train`.

    They are the files of a few hundred photographs, each under many names: an epoch is long, as it is in a real run.
    `folder/val` is the same folder once more: a data set of the trainer's has one, which nobody looks at here.
    """
    different = folder / "photographs"
    different.mkdir()
    samples = DataTask(photographs=min(count, _DIFFERENT)).samples()
    for number, sample in enumerate(samples):
        (different / f"{number}.jpg").write_bytes(sample["image"])
    for number in range(min(count, CLASSES)):
        (folder / "train" / f"class-{number}").mkdir(parents=True)
    for number in range(count):
        file = folder / "train" / f"class-{number % CLASSES}" / f"{number}.jpg"
        file.hardlink_to(different / f"{number % len(samples)}.jpg")
    os.symlink("train", folder / "val")


@dataclass(frozen=True, kw_only=True)
class EndToEndTask:
    """A training step that is fed from JPEG files; every side gets the same."""

    step: Task  # as the training benchmark has it
    flax: str = "flax"  # the sides of the training benchmark whose steps are fed
    timm: str = "timm"
    folder: str  # of the photographs, see `write_photographs`
    workers: int  # processes that read and augment

    @property
    def steps(self) -> int:
        """In a call: several batches of each worker, for they come in bursts."""
        return max(_STEPS, _STEPS_PER_WORKER * self.workers)

    @property
    def image_size(self) -> tuple[int, int]:
        return get_config(self.step.variant).image_size

    def recipe(self, augment_on: str) -> TrainConfig:
        """The settings of the trainer."""
        return dataclasses.replace(
            self.step.recipe(),
            variant=self.step.variant,
            dataset=FOLDER_PREFIX + self.folder,
            workers=self.workers,
            augment_on=augment_on,
        )

    def load(self, side: str) -> Program:
        """The program of a side, whose calls are of `steps` steps. Imports its framework."""
        if side == TIMM_FED:
            from benchmarks.sides import fed_timm as end_to_end_timm

            return end_to_end_timm.load(self)
        if side in FLAX_FED:
            from benchmarks.sides import fed_flax as end_to_end_flax

            return end_to_end_flax.load(self, augment_on=FLAX_FED[side])
        alone = self.step.load(side)
        # FLOPs and their peak are the training benchmark's to measure
        return dataclasses.replace(
            alone, run=lambda calls: alone.run(calls * self.steps), flops=None, peak_flops=None, float32=None
        )


@dataclass(frozen=True)
class Delivered:
    """What is looked at of a batch that an input pipeline delivered."""

    shape: tuple[int, ...]
    dtype: str
    darkest: float
    brightest: float
    beyond: float  # share of the values that no pixel has
    labels: tuple[int, int]  # the lowest and the highest

    @classmethod
    def of(cls, images: np.ndarray, labels: np.ndarray) -> "Delivered":
        """Of a batch with the channels last."""
        beyond = np.mean((images < _BLACK) | (images > _WHITE))
        extremes = float(images.min()), float(images.max())
        return cls(images.shape, str(images.dtype), *extremes, float(beyond), (int(labels.min()), int(labels.max())))

    def problem(self, task: EndToEndTask) -> str | None:
        """What is wrong with it; None: it is what the step wants."""
        shape = (task.step.batch_size, *task.image_size, 3)
        if self.shape != shape or self.dtype != "float32":
            return f"batches are {self.dtype} of {self.shape}, not float32 of {shape}"
        if not (self.darkest < _DARK and self.brightest > _BRIGHT and self.beyond <= _ERASED):  # not so for NaN either
            return (
                f"pixels from {self.darkest:.2f} to {self.brightest:.2f}, {self.beyond:.1%} of them beyond black and "
                "white, are no photographs normalised as for ImageNet"
            )
        if not 0 <= self.labels[0] <= self.labels[1] < CLASSES:
            return f"labels from {self.labels[0]} to {self.labels[1]} are not those of the {CLASSES} folders"
        return None
