"""What the end-to-end sides share: the step alone, what is looked at of a batch, how rounds begin and end.

Imports no framework.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from benchmarks.task import PHOTOGRAPH_CLASSES, EndToEndTask, Program
from benchmarks.worker import children_seconds, load_program

_BLACK, _WHITE = -2.118, 2.641  # of the darkest and the brightest channel, normalised as for ImageNet
_DARK, _BRIGHT = -1.0, 1.0  # which photographs pass in both directions
_ERASED = 0.02  # largest share of values beyond black and white: normal noise, in part of some images

_LOOK_EVERY = 0.5  # seconds
_AT_REST = 0.1  # cores; workers that wait for a place in a queue look up now and then
_PATIENCE = 60.0  # seconds


def load_step_alone(task: EndToEndTask, side: str) -> Program:
    """A side of the training benchmark, whose batch lies on the device, in calls of as many steps as the fed ones."""
    alone = load_program(task.step, side)
    # FLOPs and their peak are the training benchmark's to measure
    return dataclasses.replace(
        alone, run=lambda calls: alone.run(calls * task.steps), flops=None, peak_flops=None, float32=None
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
        if not 0 <= self.labels[0] <= self.labels[1] < PHOTOGRAPH_CLASSES:
            return f"labels from {self.labels[0]} to {self.labels[1]} are not those of the {PHOTOGRAPH_CLASSES} folders"
        return None


@contextlib.contextmanager
def steady_state(
    take: Callable[[], object], train: Callable[[int], None], *, ahead: int, workers: int
) -> Iterator[None]:
    """Surrounds a round: before it, no batch lies ready.

    Between its rounds a pipeline fills its queues, and a round that began with them would be one of a faster pipeline.
    So all that can lie ready is thrown away, and each worker delivers one batch that is trained on: the queues are then
    as they are in the middle of a long run, empty where the workers are slower than the step.

    Args:
        take: takes a batch from the pipeline.
        train: so many steps, each on a new batch.
        ahead: at least as many batches as can lie ready.
        workers: processes of the pipeline.
    """
    for _ in range(ahead):
        take()
    train(workers)
    yield


def wait_for_rest() -> None:
    """Returns when the children of this process do not compute any more, after a minute at the latest.

    Workers that fill their queues after a round would take the cores from the side whose turn is next.
    """
    end = time.perf_counter() + _PATIENCE
    before, working = children_seconds(), True
    while working and time.perf_counter() < end:
        time.sleep(_LOOK_EVERY)
        now = children_seconds()
        before, working = now, now - before > _AT_REST * _LOOK_EVERY
