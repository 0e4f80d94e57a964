"""The training state: a plain dict of `params` (a pure dict of arrays), `opt` (optax's state) and `step` (int32)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from crossvit_jax import CrossViT, CrossViTConfig
from train.sharding import replicated

State = dict[str, Any]


def abstract_model(model_config: CrossViTConfig) -> CrossViT:
    """The model with shapes instead of arrays: its structure, at no cost."""
    return nnx.eval_shape(lambda: CrossViT(model_config, rngs=nnx.Rngs(params=0)))


def make_state(params: Any, optimizer: optax.GradientTransformation) -> State:
    """A fresh state around given parameters."""
    return {"params": params, "opt": optimizer.init(params), "step": jnp.zeros((), jnp.int32)}


def abstract_state(model: CrossViT, optimizer: optax.GradientTransformation) -> State:
    """The state of a model with shapes instead of arrays: enough to compile a step."""
    return jax.eval_shape(lambda params: make_state(params, optimizer), nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def init_state(
    model_config: CrossViTConfig, optimizer: optax.GradientTransformation, *, seed: int, mesh: Mesh
) -> State:
    """A state with newly drawn parameters, made where it will live. The same seed gives the same bits."""

    def init(key: jax.Array) -> State:
        model = CrossViT(model_config, rngs=nnx.Rngs(params=key))
        return make_state(nnx.to_pure_dict(nnx.state(model, nnx.Param)), optimizer)

    # on a CPU, to optimise a program that runs once takes longer than the program
    options = {"xla_backend_optimization_level": 0} if mesh.devices.flat[0].platform == "cpu" else None
    return jax.jit(init, out_shardings=replicated(mesh), compiler_options=options)(jax.random.key(seed))
