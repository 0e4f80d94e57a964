"""The training state: a plain dict of `params` (a pure dict of arrays), `opt` (optax's state) and `step` (int32).

With a moving average of the weights also `ema`, like `params`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from crossvit_jax import CrossViT, CrossViTConfig
from train.config import TrainConfig
from train.devices.mesh import put, state_shardings
from train.optim.quantize import fake_quantised

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


@partial(jax.jit, static_argnames=("model_config", "dtype"))
def _draw(key: jax.Array, *, model_config: CrossViTConfig, dtype: Any) -> tuple[nnx.GraphDef, Any]:
    """A new model's structure and parameters. A jitted function, because jax traces it once for all that call it."""
    graphdef, params = nnx.split(CrossViT(model_config, dtype=dtype, rngs=_Keys(key)))
    return graphdef, nnx.to_pure_dict(params)


def _dtype(config: TrainConfig | None) -> Any:
    return jnp.bfloat16 if config is not None and config.precision == "bfloat16" else None


def abstract_model(model_config: CrossViTConfig, config: TrainConfig | None = None) -> CrossViT:
    """The model with shapes instead of arrays: its structure, at no cost. Computes as the run's settings want it."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    model = nnx.merge(*_draw.eval_shape(key, model_config=model_config, dtype=_dtype(config)))
    if config is not None:
        model.set_grad_checkpointing(config.grad_checkpointing)
        if config.qat is not None:
            model = fake_quantised(model, config.qat)
    return model


def trainable(params: Any, config: TrainConfig) -> Any:
    """The part of the parameters that is trained: all of them, or with a frozen backbone the heads."""
    return {"head": params["head"]} if config.freeze_backbone else params


def make_state(params: Any, optimizer: optax.GradientTransformation, config: TrainConfig) -> State:
    """A fresh state around given parameters."""
    state = {"params": params, "opt": optimizer.init(trainable(params, config)), "step": jnp.zeros((), jnp.int32)}
    return state | {"ema": jax.tree.map(jnp.copy, params)} if config.ema_decay else state


def abstract_state(model: CrossViT, optimizer: optax.GradientTransformation, config: TrainConfig) -> State:
    """The state of a model with shapes instead of arrays: enough to compile a step."""
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return jax.eval_shape(lambda params: make_state(params, optimizer, config), params)


def init_state(
    model_config: CrossViTConfig,
    optimizer: optax.GradientTransformation,
    config: TrainConfig,
    mesh: Mesh,
    params: Any = None,
) -> State:
    """A new state, made where it will live. The same seed gives the same bits.

    Args:
        params: initial parameters as numpy arrays; none: newly drawn ones.
    """
    _, init = lower_init(model_config, optimizer, config, mesh, params)
    return init()


def lower_init(
    model_config: CrossViTConfig,
    optimizer: optax.GradientTransformation,
    config: TrainConfig,
    mesh: Mesh,
    params: Any = None,
) -> tuple[State, Callable[[], State]]:
    """The shapes of a new state, and a function that does what `init_state` does, for another thread.

    All that takes Python long is done before: two threads that trace at the same time only wait for each other.
    """

    def init(seed: jax.Array) -> State:
        _, params = _draw(jax.random.key(seed), model_config=model_config, dtype=_dtype(config))
        return make_state(params, optimizer, config)

    seed = np.uint32(config.seed)
    shapes = jax.eval_shape(init, seed)
    shardings = state_shardings(shapes, mesh)
    if params is not None:
        around = jax.jit(
            lambda params: make_state(params, optimizer, config),
            in_shardings=(shardings["params"],),
            out_shardings=shardings,
        ).lower(shapes["params"])
        return shapes, lambda: around.compile()(put(params, shardings["params"]))
    # on a CPU, to optimise a program that runs once takes longer than the program
    options = {"xla_backend_optimization_level": 0} if mesh.devices.flat[0].platform == "cpu" else None
    lowered = jax.jit(init, out_shardings=shardings, compiler_options=options).lower(seed)
    return shapes, lambda: lowered.compile()(seed)
