"""The trainer's pipeline and step: what `python -m train.main` runs between two checkpoints."""

import atexit
from collections import deque

import jax
import numpy as np

from benchmarks.sides.fed import fed_program
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
    source, transform = open_image_sets(config).train, train_transform(config, config.model_config(num_classes=1000))
    how = {"batch_size": config.batch_size, "seed": config.seed, "workers": config.workers}
    batches = train_batches(source, transform, **how)
    stream = device_batches(batches, programs.plan.mesh)
    done, computing = 0, deque()

    def next_batch() -> dict[str, jax.Array]:
        batch = next(stream)
        del batch["bad_indices"], batch["tagged"]
        if programs.augment is not None:
            batch = programs.augment(batch, done)
        return batch

    def look() -> tuple[np.ndarray, np.ndarray]:
        batch = next_batch()
        return np.asarray(batch["image"]), np.asarray(batch["label"])

    def train(steps: int) -> None:
        nonlocal state, done
        for _ in range(steps):
            state, metrics = programs.train_step(state, next_batch())
            done += 1
            computing.append(metrics)
            if len(computing) > _STEPS_AHEAD:
                jax.device_get(computing.popleft())
        jax.block_until_ready(state)

    def close() -> None:
        stream.close()
        programs.close()
        give_back_memory()
        atexit.unregister(give_back_memory)  # by then multiprocessing has ended the thread that it asks

    ahead = _AHEAD_PER_WORKER * task.workers + _AHEAD
    how = {"look": look, "train": train, "ahead": ahead, "facts": jax_facts(), "close": close}
    return fed_program(task, take=lambda: next(stream), **how)
