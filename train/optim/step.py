"""One training step and one evaluation step of a task, each a pure function to be jitted over a mesh."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from train.config import TrainConfig
from train.devices.mesh import batch_sharding, replicated, state_shardings
from train.devices.normalise import normalise_batch
from train.optim.loss_scale import all_finite, next_loss_scale, unless_skipped
from train.optim.state import State, merged, trained_and_frozen
from train.tasks.task import Batch, Task, Tree

Metrics = dict[str, Array]


def make_train_step(
    model: nnx.Module, task: Task, optimizer: optax.GradientTransformation, config: TrainConfig
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """The step (state, batch) -> (state, metrics) of a model. Not jitted, see `jit_train_step`.

    Everything random follows from `config.seed` and the state's step. A batch is one of the task's, with perhaps `bad`
    (batch,), int32: -1, or the image that could not be read there. Metrics are the means of the batch: `loss`, those of
    the task that training tells, and the number `bad` of images that could not be read; in float16 also `loss_scale`,
    and whether the step was `skipped` because a gradient was infinite or NaN: it changes nothing but the step's number
    and the scale.

    Args:
        model: one of the task's. It gives the structure only, so `abstract_model` is enough; the parameters come from
            the state.
    """
    graphdef = _structure(model, training=True)

    def loss(trained: Tree, rest: tuple[Tree, Tree | None, Array | None], part: Batch, key: Array):
        frozen, extra, factor = rest
        model = nnx.merge(graphdef, merged(trained, frozen))
        value, aux = task.loss(model, part, extra, rngs=nnx.Rngs(dropout=key))
        return (value if factor is None else value * factor), (value, aux)

    gradient = jax.grad(loss, has_aux=True)

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        batch_key, dropout_key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), state["step"]))
        batch = dict(batch)
        bad = batch.pop("bad", None)
        batch = task.prepare(batch, batch_key)

        trained, frozen = trained_and_frozen(state["params"], config, model)
        extra, scale = state.get("extra"), state.get("loss_scale")
        rest = (frozen, extra, scale and scale.factor)
        if config.grad_accum == 1:
            gradients, (loss, aux) = gradient(trained, rest, batch, dropout_key)
        else:
            parts = jax.tree.map(lambda array: _parts(array, config.grad_accum), batch)
            keys = jax.random.split(dropout_key, config.grad_accum)
            first = jax.eval_shape(gradient, trained, rest, jax.tree.map(lambda x: x[0], parts), keys[0])
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)

            def add(sums: Tree, part: tuple[Batch, Array]) -> tuple[Tree, None]:
                return jax.tree.map(jnp.add, sums, gradient(trained, rest, *part)), None

            sums, _ = jax.lax.scan(add, zeros, (parts, keys))
            gradients, (loss, aux) = jax.tree.map(lambda x: x / config.grad_accum, sums)
        if scale is not None:
            gradients = jax.tree.map(lambda x: x / scale.factor, gradients)

        is_first = state["step"] == 0 if scale is None else scale.updates == 0
        updates, opt = optimizer.update(gradients, state["opt"], trained)
        params = merged(optax.apply_updates(trained, updates), frozen)
        new = {"params": params, "opt": opt, "step": state["step"] + 1}
        if config.ema_decay:
            new["ema"] = _averaged(state["ema"], params, config.ema_decay, first=is_first)
        if extra is not None:
            new["extra"] = task.update(extra, aux, params, new["step"])
        metrics = {"loss": loss} | {metric.name: aux[metric.name] for metric in task.metrics if metric.name in aux}
        if scale is not None:
            finite = all_finite(gradients)
            kept = {name: unless_skipped(new[name], state[name], finite=finite) for name in new if name != "step"}
            new |= kept | {"loss_scale": next_loss_scale(scale, finite=finite)}
            metrics |= {"loss_scale": scale.factor, "skipped": jnp.where(finite, 0, 1)}
        if bad is not None:
            metrics["bad"] = jnp.sum(bad >= 0)
        return new, metrics

    return train_step


def _averaged(means: Tree, params: Tree, decay: float, *, first: Array) -> Tree:
    """The moving average after one more step, as timm's train.py takes it (ModelEmaV3, `step=`): it begins with the
    weights that the first step leads to."""
    return jax.tree.map(lambda mean, x: jnp.where(first, x, mean + (1 - decay) * (x - mean)), means, params)


def _parts(array: Array, parts: int) -> Array:
    """(batch, ...) as (parts, batch / parts, ...). Part j has every so many images from j on: each device, its own."""
    return jnp.swapaxes(array.reshape(array.shape[0] // parts, parts, *array.shape[1:]), 0, 1)


def make_eval_step(model: nnx.Module, task: Task) -> Callable[[Tree, Batch], Tree]:
    """The function (params, batch) -> what `task.evaluate` returns of the batch, normalised. Not jitted, see
    `jit_eval_step`.

    Args:
        model: as in `make_train_step`.
    """
    graphdef = _structure(model, training=False)

    def eval_step(params: Tree, batch: Batch) -> Tree:
        return task.evaluate(nnx.merge(graphdef, params), normalise_batch(batch))

    return eval_step


def _structure(model: nnx.Module, *, training: bool) -> nnx.GraphDef:
    """The model without its arrays, in one mode; the mode of the model itself stays as it was."""
    copy = nnx.clone(model)
    copy.train() if training else copy.eval()
    return nnx.graphdef(copy)


def jit_train_step(
    train_step: Callable[[State, Batch], tuple[State, Metrics]],
    mesh: Mesh,
    state: State,
    compiler_options: dict[str, Any] | None = None,
):
    """The step compiled for a mesh: batch and state cut over the devices, the state's memory used again.

    Args:
        state: the training state, or its shapes.
        compiler_options: XLA's, by their names.
    """
    shardings = state_shardings(state, mesh)
    return jax.jit(
        train_step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
        compiler_options=compiler_options,
    )


def jit_eval_step(
    eval_step: Callable[[Tree, Batch], Tree], mesh: Mesh, params: Tree, compiler_options: dict[str, Any] | None = None
):
    """The evaluation step compiled for a mesh; every process gets all of its outputs.

    Args:
        params: the parameters, or their shapes.
        compiler_options: XLA's, by their names.
    """
    return jax.jit(
        eval_step,
        in_shardings=(state_shardings(params, mesh), batch_sharding(mesh)),
        out_shardings=replicated(mesh),
        compiler_options=compiler_options,
    )
