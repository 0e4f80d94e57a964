"""Our model and training step, jitted."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from benchmarks.task import CHECKED_STEPS, Program, Task, usable_cores
from convert import load_flax
from train.config import TrainConfig
from train.host_memory import keep_freed_memory
from train.optimizer import make_optimizer
from train.sharding import make_mesh
from train.state import State, make_state
from train.step import jit_train_step, make_train_step

_NEVER = 1_000_000_000  # steps per epoch: the learning rate stays that of the first one


def load(task: Task) -> Program:
    """The task's program, not compiled yet."""
    set_up(task)
    return {"inference": _inference, "training": _training}[task.benchmark](task)


def set_up(task: Task) -> None:
    """What jax has to know before it computes."""
    if task.device == "cpu":
        keep_freed_memory()  # as the commands of train do
    if task.dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")  # a GPU's default is TF32


def _inference(task: Task) -> Program:
    dtype = jnp.dtype(task.dtype)
    model = load_flax(task.weights, dtype=dtype, param_dtype=dtype)
    model.set_attention(task.attention)
    graphdef, params = nnx.split(model)
    params = nnx.to_pure_dict(params)
    images = jnp.asarray(task.images(), dtype)

    @jax.jit
    def forward(params, images):
        return nnx.merge(graphdef, params)(images)

    def run(calls: int) -> None:
        for _ in range(calls):
            forward(params, images).block_until_ready()

    return Program(lambda: np.asarray(forward(params, images), np.float32), run, facts())


def _training(task: Task) -> Program:
    config = task.recipe()
    _, state, step_of = begin_training(task)
    step, unmixed_step = step_of(config), step_of(dataclasses.replace(config, mixup=0.0, cutmix=0.0))
    batch = {
        "image": jnp.asarray(task.images()),
        "label": jnp.asarray(task.labels()),
        "bad": jnp.full(task.batch_size, -1, jnp.int32),  # as in every batch of the trainer: none is unreadable
    }

    def check() -> np.ndarray:
        nonlocal state
        losses = []
        for _ in range(CHECKED_STEPS):
            state, metrics = unmixed_step(state, batch)
            losses.append(float(metrics["loss"]))
        return np.array(losses)

    def run(calls: int) -> None:
        nonlocal state
        for _ in range(calls):
            state, _ = step(state, batch)
        jax.block_until_ready(state)

    return Program(check, run, facts())


def begin_training(task: Task) -> tuple[Mesh, State, Callable[[TrainConfig], Callable]]:
    """One device; the trainer's state around the task's weights; what makes the trainer's jitted step of a recipe."""
    config = task.recipe()
    model = load_flax(task.weights, dtype=jnp.dtype(task.dtype))
    model.set_attention(task.attention)
    optimizer = make_optimizer(config, steps_per_epoch=_NEVER, no_weight_decay=model.no_weight_decay())
    mesh = make_mesh(devices=jax.devices()[:1])
    state = make_state(nnx.to_pure_dict(nnx.state(model, nnx.Param)), optimizer, config)
    return mesh, state, lambda recipe: jit_train_step(make_train_step(model, optimizer, recipe), mesh, state)


def facts() -> dict[str, str]:
    """Versions and threads."""
    device = jax.devices()[0]
    return {
        "jax": jax.__version__,
        "jax threads": str(usable_cores()),
        "jax device": device.device_kind if device.platform != "cpu" else "cpu",
    }
