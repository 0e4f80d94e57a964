"""The trainer's pipeline and step: what `python -m train.main` runs between two checkpoints."""

import atexit
from collections import deque

import jax
import numpy as np

from benchmarks.sides.fed import begin_round, check_batch, wait_for_rest
from benchmarks.sides.flax import begin, programs_of, set_up
from benchmarks.task import EndToEndTask, Program, jax_facts
from train.data.batches import train_batches
from train.data.datasets import open_image_sets
from train.data.streams import device_batches
from train.data.workers import give_back_memory
from train.images.transforms import train_transform

# At most: a worker reads two, waits with one and has one in its queue, the main process has two more of each worker
# and a few on the device.
_AHEAD_PER_WORKER, _AHEAD = 6, 4
_STEPS_AHEAD = 2  # of the device, at which the trainer reads a step's metrics: no host runs far ahead


def load(task: EndToEndTask, side: str) -> Program:
    """The program, whose workers have begun to read; its step is being compiled."""
    set_up(task)
    config = task.fed_recipe(augment_on=side.removeprefix("flax-"))
    programs = programs_of(task, config)
    state = begin(programs, task)
    batches = train_batches(
        open_image_sets(config).train,
        train_transform(config, config.model_config(num_classes=1000)),
        batch_size=config.batch_size,
        seed=config.seed,
        workers=config.workers,
    )
    stream = device_batches(batches, programs.plan.mesh)
    done, computing = 0, deque()

    def next_batch() -> dict[str, jax.Array]:
        batch = next(stream)
        del batch["bad_indices"], batch["tagged"]
        if programs.augment is not None:
            batch = programs.augment(batch, done)
        return batch

    def check() -> dict[str, np.ndarray]:
        batch = next_batch()
        check_batch(task, np.asarray(batch["image"]), np.asarray(batch["label"]))
        return {}

    def train(steps: int) -> None:
        nonlocal state, done
        for _ in range(steps):
            state, metrics = programs.train_step(state, next_batch())
            done += 1
            computing.append(metrics)
            if len(computing) > _STEPS_AHEAD:
                jax.device_get(computing.popleft())
        jax.block_until_ready(state)

    def before_round() -> None:
        ahead = _AHEAD_PER_WORKER * task.workers + _AHEAD
        begin_round(lambda: next(stream), train, ahead=ahead, workers=task.workers)

    def close() -> None:
        stream.close()
        programs.close()
        give_back_memory()
        atexit.unregister(give_back_memory)  # by then multiprocessing has ended the thread that it asks

    return Program(
        check,
        run=train,
        facts=jax_facts(),
        before_round=before_round,
        close=close,
        rest=wait_for_rest,
    )
