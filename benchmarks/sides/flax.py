"""Our model and training step, jitted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.sides.model_flops import PRODUCT, flops_per_image, peak_flops
from benchmarks.task import CHECKED_STEPS, Program, Task, jax_facts, on_gpu, repeated
from convert import load_flax, load_weights
from convert.tree import flatten, nest
from train.config import TrainConfig
from train.devices.mesh import make_mesh
from train.devices.process import keep_freed_memory
from train.optim.programs import Plan, Programs
from train.optim.state import State
from train.tasks.classification import Classification

_NEVER = 1_000_000_000  # steps per epoch: the learning rate stays that of the first one


def load(task: Task, side: str) -> Program:
    """The task's program, not compiled yet: with XLA's attention, or on the side `flax-cudnn` with cuDNN's."""
    set_up(task)
    attention = "cudnn" if side == "flax-cudnn" else "xla"
    program = {"inference": _inference, "training": _training}[task.benchmark](task, attention)
    program = dataclasses.replace(
        program,
        flops=lambda: task.batch_size * flops_per_image(task.variant, training=task.benchmark == "training"),
        peak_flops=(lambda: _peak_flops(task)) if side == "flax" else None,
    )
    if task.device == "cpu":
        return program
    return on_gpu(program, peak_bytes=lambda: jax.devices()[0].memory_stats()["peak_bytes_in_use"])


def set_up(task: Task) -> None:
    """What jax has to know before it computes."""
    if task.device == "cpu":
        keep_freed_memory()  # as the commands of train do
    if task.dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")  # a GPU's default is TF32


def _inference(task: Task, attention: str) -> Program:
    dtype = jnp.dtype(task.dtype)
    model = load_flax(task.weights, dtype=dtype, param_dtype=dtype)
    model.set_attention(attention)
    graphdef, params = nnx.split(model)
    params = nnx.to_pure_dict(params)
    images = jnp.asarray(task.images(), dtype)

    @jax.jit
    def forward(params, images):
        return nnx.merge(graphdef, params)(images)

    def check() -> dict[str, np.ndarray]:
        return {"logits": np.asarray(forward(params, images), np.float32)}

    def call() -> jax.Array:
        logits = forward(params, images)
        return logits.block_until_ready() if task.device == "cpu" else logits

    return Program(check, repeated(call, jax.block_until_ready), jax_facts())


def _training(task: Task, attention: str) -> Program:
    config = task.recipe()
    batch = {
        "image": jnp.asarray(task.images()),
        "label": jnp.asarray(task.labels()),
        "bad": jnp.full(task.batch_size, -1, jnp.int32),  # as in every batch of the trainer: none is unreadable
    }
    state, step = None, None

    def check() -> dict[str, np.ndarray]:
        nonlocal state, step
        recipes = [config, dataclasses.replace(config, mixup=0.0, cutmix=0.0)]
        mixing, plain = (programs_of(task, recipe, attention) for recipe in recipes)  # compile at the same time
        state, step = begin(plain, task), mixing.train_step
        losses = []
        for _ in range(CHECKED_STEPS):
            state, metrics = plain.train_step(state, batch)
            losses.append(float(metrics["loss"]))
        moments = flatten(optax.tree_utils.tree_get(state["opt"], "mu"))
        gradients = [np.linalg.norm(moments[name]) for name in sorted(moments)]
        return {"losses": np.array(losses), "gradients": np.array(gradients)}

    def call() -> State:
        nonlocal state
        state, _ = step(state, batch)
        return state

    return Program(check, repeated(call, jax.block_until_ready), jax_facts())


def programs_of(task: Task, recipe: TrainConfig, attention: str) -> Programs:
    """The trainer's programs for a recipe, on one device."""
    config = dataclasses.replace(recipe, precision=task.dtype, attention_kernel=attention)
    learned = Classification(config, load_weights(task.weights).config, ())
    return Programs(Plan(learned, config, make_mesh(devices=jax.devices()[:1]), _NEVER))


def begin(programs: Programs, task: Task) -> State:
    """The trainer's state around the task's weights."""
    return programs.new_state(nest(load_weights(task.weights).tensors))


def _peak_flops(task: Task) -> float:
    rows = PRODUCT[task.device]
    a, b = jax.random.normal(jax.random.key(0), (2, rows, rows), task.dtype)
    multiply = jax.jit(jnp.matmul)
    return peak_flops(task.device, lambda: multiply(a, b), jax.block_until_ready)
