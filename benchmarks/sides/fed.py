"""What sides share whose steps are fed: what a batch must be, how rounds begin and end. Imports no framework."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil

from benchmarks.task import PHOTOGRAPH_CLASSES, EndToEndTask, Program, cpu_seconds

_BLACK, _WHITE = -2.118, 2.641  # of the darkest and the brightest channel, normalised as for ImageNet
_DARK, _BRIGHT = -1.0, 1.0  # which photographs pass in both directions
_ERASED = 0.02  # largest share of values beyond black and white: normal noise, in part of some images

_LOOK_EVERY = 0.5  # seconds
_AT_REST = 0.1  # cores; workers that wait for a place in a queue look up now and then
_PATIENCE = 60.0  # seconds


def check_batch(task: EndToEndTask, images: np.ndarray, labels: np.ndarray) -> None:
    """Raises ValueError if a batch with the channels last is not of photographs as the model wants them."""
    shape = (task.batch_size, *task.config().image_size, 3)
    if images.shape != shape or images.dtype != np.float32:
        raise ValueError(f"batches are {images.dtype} of {images.shape}, not float32 of {shape}")
    darkest, brightest, beyond = images.min(), images.max(), np.mean((images < _BLACK) | (images > _WHITE))
    if not (darkest < _DARK and brightest > _BRIGHT and beyond <= _ERASED):  # not so for NaN either
        told = f"pixels from {darkest:.2f} to {brightest:.2f}, {beyond:.1%} of them beyond black and white"
        raise ValueError(f"{told}, are no photographs normalised as for ImageNet")
    if not 0 <= labels.min() <= labels.max() < PHOTOGRAPH_CLASSES:
        raise ValueError(f"labels from {labels.min()} to {labels.max()} are not those of {PHOTOGRAPH_CLASSES} folders")


def wait_for_rest() -> None:
    """Returns when this process and its children do not compute any more, after a minute at the latest.

    Workers that fill their queues after a round would take the cores from the side whose turn is next.
    """
    end, process = time.perf_counter() + _PATIENCE, psutil.Process()
    before, working = cpu_seconds(process), True
    while working and time.perf_counter() < end:
        time.sleep(_LOOK_EVERY)
        now = cpu_seconds(process)
        before, working = now, now - before > _AT_REST * _LOOK_EVERY


def fed_program(
    task: EndToEndTask,
    *,
    take: Callable[[], object],
    look: Callable[[], tuple[np.ndarray, np.ndarray]],
    train: Callable[[int], None],
    ahead: int,
    rest: Callable[[], None] = wait_for_rest,
    **others: Any,
) -> Program:
    """The program of a pipeline and its step. When a round begins, no batch lies ready.

    Between its rounds a pipeline fills its queues, and a round that began with them would be one of a faster pipeline.
    So all that can lie ready is thrown away, and each worker delivers one batch that is trained on: the queues are then
    as they are in the middle of a long run, empty where the workers are slower than the step.

    Args:
        take: takes a batch from the pipeline.
        look: takes one as images with the channels last, and labels.
        train: so many steps, each on a new batch.
        ahead: at least as many batches as can lie ready.
    """

    def check() -> dict[str, np.ndarray]:
        check_batch(task, *look())
        return {}

    def before_round() -> None:
        for _ in range(ahead):
            take()
        train(task.workers)

    return Program(check, train, before_round=before_round, rest=rest, **others)
