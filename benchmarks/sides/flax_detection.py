"""Our detector from images to boxes, and the trainer's own step."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.task import CHECKED_STEPS, DetectionTask, Program, jax_facts, repeated
from convert import load_flax, load_weights
from convert.tree import nest
from train.devices.mesh import make_mesh
from train.devices.process import keep_freed_memory
from train.optim.programs import Plan, Programs
from train.optim.state import State
from train.tasks.detection import Detection

_NEVER = 1_000_000_000  # steps per epoch: the learning rate stays that of the first one


def load(task: DetectionTask, side: str) -> Program:
    """The task's program, not compiled yet."""
    keep_freed_memory()  # as the commands of train do
    jax.config.update("jax_default_matmul_precision", "highest")
    return {"inference": _inference, "training": _training}[task.benchmark](task)


def _inference(task: DetectionTask) -> Program:
    graphdef, params = nnx.split(load_flax(task.weights))
    params = nnx.to_pure_dict(params)
    images = jnp.asarray(task.images())

    @jax.jit
    def detect(params, images):
        return nnx.merge(graphdef, params).detect(images)

    def check() -> dict[str, np.ndarray]:
        return {"scores": np.asarray(detect(params, images)["scores"])}

    return Program(check, repeated(lambda: jax.block_until_ready(detect(params, images))), jax_facts())


def _training(task: DetectionTask) -> Program:
    config, weights, targets = task.recipe(), load_weights(task.weights), task.targets()
    names = tuple(map(str, range(weights.config.num_classes)))
    learned = Detection(config, weights.config, names, most_boxes=targets["boxes"].shape[1])
    programs = Programs(Plan(learned, config, make_mesh(devices=jax.devices()[:1]), _NEVER))
    # `bad` as in every batch of the trainer: no image is unreadable
    batch = {"image": task.images(), **targets, "bad": np.full(task.batch_size, -1, np.int32)}
    batch = {name: jnp.asarray(array) for name, array in batch.items()}
    state = programs.new_state(nest(weights.tensors))

    def step() -> jax.Array:
        nonlocal state
        state, metrics = programs.train_step(state, batch)
        return metrics["loss"]

    def check() -> dict[str, np.ndarray]:
        return {"losses": np.array([float(step()) for _ in range(CHECKED_STEPS)])}

    def call() -> State:
        step()
        return state

    return Program(check, repeated(call, jax.block_until_ready), jax_facts())
