"""The trainer's pipeline and step: what `python -m train.main` runs between two checkpoints."""

import atexit

import jax
import numpy as np

from benchmarks.sides.fed import Delivered, steady_state, wait_for_rest
from benchmarks.sides.flax import begin, programs_of, set_up
from benchmarks.task import FLAX_FED, EndToEndTask, Program, jax_facts
from train.config import TrainConfig
from train.data.batches import train_batches
from train.data.datasets import open_image_sets
from train.data.streams import device_batches
from train.data.workers import give_back_memory
from train.images.transforms import train_transform
from train.run.meter import Meter
from train.run.metrics_log import NoLog
from train.run.progress import Progress

# At most: a worker reads two, waits with one and has one in its queue, the main process has two more of each worker
# and a few on the device.
_AHEAD_PER_WORKER, _AHEAD = 6, 4


def load(task: EndToEndTask, side: str) -> Program:
    """The program, whose workers have begun to read; its step is being compiled."""
    augment_on = FLAX_FED[side]
    set_up(task.step)
    config = task.recipe(augment_on)
    programs = programs_of(task.step, config, "cudnn" if task.flax == "flax-cudnn" else "xla")
    state = begin(programs, task.step)
    batches = train_batches(
        open_image_sets(config).train,
        train_transform(config, config.model_config(num_classes=1000)),
        batch_size=config.batch_size,
        seed=config.seed,
        workers=config.workers,
    )
    stream = device_batches(batches, programs.plan.mesh)
    meter = _meter(config)
    done = 0

    def next_batch() -> dict[str, jax.Array]:
        batch = next(stream)
        del batch["bad_indices"], batch["tagged"]
        if programs.augment is not None:
            batch = programs.augment(batch, done)
        return batch

    def check() -> Delivered:
        batch = next_batch()
        return Delivered.of(np.asarray(batch["image"]), np.asarray(batch["label"]))

    def train(steps: int) -> None:
        nonlocal state, done
        for _ in range(steps):
            state, metrics = programs.train_step(state, next_batch())
            done += 1
            meter.add(metrics)
        meter.catch_up()

    def around():
        ahead = _AHEAD_PER_WORKER * task.workers + _AHEAD
        return steady_state(lambda: next(stream), train, ahead=ahead, workers=task.workers)

    def close() -> None:
        stream.close()
        programs.close()
        give_back_memory()
        atexit.unregister(give_back_memory)  # by then multiprocessing has ended the thread that it asks

    return Program(
        check,
        run=lambda calls: train(calls * task.steps),
        facts=jax_facts(),
        around=around,
        close=close,
        rest=wait_for_rest,
    )


def _meter(config: TrainConfig) -> Meter:
    """The trainer's own, without a log. It waits for each step's metrics two steps later: no host runs far ahead."""
    meter = Meter(
        NoLog(),
        Progress((), None, epochs=1, steps_per_epoch=1, silent=True),
        metrics=(),
        step=0,
        batch_size=config.batch_size,
        log_every=config.log_every,
        learning_rate=lambda step: config.peak_lr,
    )
    meter.begin(epoch=1)
    return meter
