"""Our model and training step, jitted."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.sides.peak import PRODUCT, peak_flops
from benchmarks.task import CHECKED_STEPS, NEVER, ModelTask, Program, jax_facts, repeated
from convert import load_flax, load_weights
from convert.tree import flatten, nest
from train.config import TrainConfig
from train.cost.flops import flops_per_image
from train.devices.attention import choose_attention
from train.devices.mesh import make_mesh
from train.devices.process import keep_freed_memory
from train.optim.programs import Plan, Programs
from train.optim.state import State
from train.tasks.classification import Classification
from train.tasks.task import Task

Learned = Callable[[TrainConfig, Any, tuple[str, ...]], Task]  # of settings, the model's, and the names of classes


def load(task: ModelTask, side: str) -> Program:
    """The task's program, not compiled yet."""
    set_up(task)
    is_training = task.benchmark == "training"
    program = training(task, {"label": task.labels()}) if is_training else _inference(task)
    flops = lambda: task.batch_size * flops_per_image(task.config(), gradient=is_training)  # noqa: E731
    return dataclasses.replace(program, flops=flops, peak_flops=lambda: _peak_flops(task))


def set_up(task: ModelTask) -> None:
    """What jax has to know before it computes."""
    if task.device == "cpu":
        keep_freed_memory()  # as the commands of train do
    if task.dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")  # a GPU's default is TF32


def _attention(task: ModelTask) -> str:
    """The kernel of self-attention that the trainer takes here: on GPUs cuDNN's where it can be had."""
    model, mesh = load_weights(task.weights).config, make_mesh(devices=jax.devices()[:1])
    return choose_attention("auto", model, task.dtype, mesh, training=task.benchmark == "training")[0]


def jitted(model: nnx.Module, call: Callable[[Any, jax.Array], Any] = lambda model, images: model(images)):
    """A compiled function of images; the parameters are arguments of the program, not constants in it."""
    graphdef, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    program = jax.jit(lambda params, images: call(nnx.merge(graphdef, params), images))
    return lambda images: program(params, images)


def _inference(task: ModelTask) -> Program:
    dtype = jnp.dtype(task.dtype)
    model = load_flax(task.weights, dtype=dtype, param_dtype=dtype)
    model.set_attention(_attention(task))
    forward, images = jitted(model), jnp.asarray(task.images(), dtype)

    def check() -> dict[str, np.ndarray]:
        return {"logits": np.asarray(forward(images), np.float32)}

    def call() -> jax.Array:
        logits = forward(images)
        return logits.block_until_ready() if task.device == "cpu" else logits

    return Program(check, repeated(call, jax.block_until_ready), jax_facts(), peak_bytes=_peak_bytes)


def training(task: ModelTask, targets: dict[str, np.ndarray], learned: Learned = Classification) -> Program:
    """The trainer's steps on images and targets."""
    config = task.recipe()
    # `bad` as in every batch of the trainer: no image is unreadable
    batch = {"image": task.images(), "bad": np.full(task.batch_size, -1, np.int32)} | targets
    batch = {name: jnp.asarray(array) for name, array in batch.items()}
    state, step = None, None

    def check() -> dict[str, np.ndarray]:
        nonlocal state, step
        plain = dataclasses.replace(config, mixup=0.0, cutmix=0.0)
        programs = [programs_of(task, recipe, learned) for recipe in ([config] if config == plain else [config, plain])]
        state, step, checked = begin(programs[-1], task), programs[0].train_step, programs[-1].train_step
        losses = []
        for _ in range(CHECKED_STEPS):
            state, metrics = checked(state, batch)
            losses.append(float(metrics["loss"]))
        moments = flatten(optax.tree_utils.tree_get(state["opt"], "mu"))
        gradients = [np.linalg.norm(moments[name]) for name in sorted(moments)]
        return {"losses": np.array(losses), "gradients": np.array(gradients)}

    def call() -> State:
        nonlocal state
        state, _ = step(state, batch)
        return state

    return Program(check, repeated(call, jax.block_until_ready), jax_facts(), peak_bytes=_peak_bytes)


def programs_of(task: ModelTask, recipe: TrainConfig, learned: Learned = Classification) -> Programs:
    """The trainer's programs for a recipe, on one device. They compile at the same time."""
    config = dataclasses.replace(recipe, precision=task.dtype, attention_kernel=_attention(task))
    model = load_weights(task.weights).config
    task_of_trainer = learned(config, model, tuple(map(str, range(model.num_classes))))
    return Programs(Plan(task_of_trainer, config, make_mesh(devices=jax.devices()[:1]), NEVER))


def begin(programs: Programs, task: ModelTask) -> State:
    """The trainer's state around the task's weights."""
    return programs.new_state(nest(load_weights(task.weights).tensors))


def _peak_bytes() -> int | None:
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def _peak_flops(task: ModelTask) -> float:
    rows = PRODUCT[task.device]
    a, b = jax.random.normal(jax.random.key(0), (2, rows, rows), task.dtype)
    multiply = jax.jit(jnp.matmul)
    return peak_flops(task.device, lambda: multiply(a, b), jax.block_until_ready)
