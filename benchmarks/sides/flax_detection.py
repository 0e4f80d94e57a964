"""Our detector from images to boxes, and the trainer's own step."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.sides import flax
from benchmarks.task import DetectionTask, Program, jax_facts, repeated
from convert import load_flax
from train.tasks.detection import Detection


def load(task: DetectionTask, side: str) -> Program:
    """The task's program, not compiled yet."""
    flax.set_up(task)
    if task.benchmark == "training":
        targets = task.targets()
        return flax.training(task, targets, partial(Detection, most_boxes=targets["boxes"].shape[1]))
    images = jnp.asarray(task.images())
    detect = flax.jitted(load_flax(task.weights), lambda model, images: model.detect(images))

    def check() -> dict[str, np.ndarray]:
        found = {name: np.asarray(array) for name, array in detect(images).items()}
        valid = found["valid"]
        return task.found([{name: found[name][i][valid[i]] for name in found} for i in range(task.batch_size)])

    return Program(check, repeated(lambda: jax.block_until_ready(detect(images))), jax_facts())
