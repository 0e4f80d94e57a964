"""The training state: a plain dict of `params` (a pure dict of arrays), `opt` (optax's state) and `step` (int32).

With a moving average of the weights also `ema`, like `params`; in float16 `loss_scale`; where the task has state of its
own, also `extra`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from train.config import TrainConfig
from train.devices.mesh import put
from train.optim.loss_scale import initial_loss_scale
from train.optim.quantize import fake_quantised
from train.tasks.task import Task, Tree

State = dict[str, Any]


class _Keys(nnx.Rngs):
    """The keys of `nnx.Rngs(params=key)`, counted in Python: its own counter makes tracing thrice as slow.

    Many are made together: one by one, half of the program that draws a model would be for them.
    """

    _TOGETHER = 256

    def __init__(self, key: jax.Array):
        self._key, self._count = key, 0

    def params(self) -> jax.Array:
        place = self._count % self._TOGETHER
        if place == 0:
            counts = self._count + jnp.arange(self._TOGETHER)
            self._keys = jax.vmap(jax.random.fold_in, (None, 0))(self._key, counts)
        self._count += 1
        return self._keys[place]


@partial(jax.jit, static_argnames=("task", "dtype"))
def _draw(key: jax.Array, *, task: Task, dtype: Any) -> tuple[nnx.GraphDef, Tree]:
    """A new model's structure and parameters. A jitted function, because jax traces it once for all that call it."""
    graphdef, params = nnx.split(task.model(dtype=dtype, rngs=_Keys(key)))
    return graphdef, nnx.to_pure_dict(params)


def _dtype(config: TrainConfig) -> Any:
    return {"bfloat16": jnp.bfloat16, "float16": jnp.float16}.get(config.precision)


def abstract_model(task: Task, config: TrainConfig) -> nnx.Module:
    """The model with shapes instead of arrays: its structure, at no cost. Computes as the run's settings want it."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    model = nnx.merge(*_draw.eval_shape(key, task=task, dtype=_dtype(config)))
    if config.grad_checkpointing:
        model.set_grad_checkpointing()
    if config.attention_kernel != "auto":
        model.set_attention(config.attention_kernel)
    if config.fp32_residual:
        model.set_fp32_residual()
    if config.qat is not None:
        model = fake_quantised(model, config.qat)
    return model


def trained_and_frozen(params: Tree, config: TrainConfig, model: nnx.Module | None = None) -> tuple[Tree, Tree]:
    """The parameters that are trained, and the others: with a frozen backbone all but the model's heads, and those that
    a model has without using them, which weight decay would shrink.

    Args:
        model: whose they are; none: all are trained.
    """
    is_unused = getattr(model, "unused", None)
    if is_unused is None and not config.freeze_backbone:
        return params, {}
    parts = {}, {}
    for path, param in flatten_dict(params).items():
        name = ".".join(map(str, path))
        stays = (config.freeze_backbone and not model.is_head(name)) or (is_unused is not None and is_unused(name))
        parts[stays][path] = param
    trained, frozen = map(unflatten_dict, parts)
    return trained, frozen


def merged(trained: Tree, frozen: Tree) -> Tree:
    """The parameters that `trained_and_frozen` took apart."""
    if not frozen:
        return trained
    return unflatten_dict(flatten_dict(frozen) | flatten_dict(trained))


def make_state(
    params: Tree,
    optimizer: optax.GradientTransformation,
    config: TrainConfig,
    model: nnx.Module | None = None,
) -> State:
    """A fresh state around given parameters, without what a task adds to it.

    Args:
        model: whose they are, see `trained_and_frozen`.
    """
    trained, _ = trained_and_frozen(params, config, model)
    opt = optimizer.init(trained)
    state = {"params": params, "opt": opt, "step": jnp.zeros((), jnp.int32)}
    if config.ema_decay:
        state["ema"] = jax.tree.map(jnp.copy, params)
    if config.precision == "float16":
        state["loss_scale"] = initial_loss_scale()
    return state


def abstract_state(
    model: nnx.Module, optimizer: optax.GradientTransformation, config: TrainConfig, task: Task | None = None
) -> State:
    """The state of a model with shapes instead of arrays: enough to compile a step.

    Args:
        task: what it learns; none: one without state of its own.
    """
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    state = jax.eval_shape(lambda params: make_state(params, optimizer, config, model), params)
    extra = None if task is None else jax.eval_shape(task.extra, params)
    return state if extra is None else state | {"extra": extra}


def lower_init(
    task: Task,
    model: nnx.Module,
    optimizer: optax.GradientTransformation,
    config: TrainConfig,
    mesh: Mesh,
    shardings: Tree,
    params: Tree | None = None,
) -> Callable[[], State]:
    """A function that compiles and runs the program that makes a new state where it will live, for another thread.

    The same seed gives the same bits. All that takes Python long is done before: two threads that trace at the same
    time only wait for each other.

    Args:
        shardings: of the state, on the mesh.
        params: initial parameters as numpy arrays; none: newly drawn ones.
    """
    made = {name: tree for name, tree in shardings.items() if name != "extra"}  # by the program

    def whole(state: State) -> State:
        extra = task.extra(state["params"]) if "extra" in shardings else None
        return state if extra is None else state | {"extra": put(extra, shardings["extra"])}

    if params is not None:
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
        around = jax.jit(
            lambda params: make_state(params, optimizer, config, model),
            in_shardings=(shardings["params"],),
            out_shardings=made,
        ).lower(shapes)
        return lambda: whole(around.compile()(put(params, shardings["params"])))

    def init(seed: jax.Array) -> State:
        _, params = _draw(jax.random.key(seed), task=task, dtype=_dtype(config))
        return make_state(params, optimizer, config, model)

    seed = np.uint32(config.seed)
    # on a CPU, to optimise a program that runs once takes longer than the program
    options = {"xla_backend_optimization_level": 0} if mesh.devices.flat[0].platform == "cpu" else None
    lowered = jax.jit(init, out_shardings=made, compiler_options=options).lower(seed)
    return lambda: whole(lowered.compile()(seed))
