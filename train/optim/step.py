"""One training step and one evaluation step, each a pure function to be jitted over a mesh."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from train.config import TrainConfig
from train.devices.mesh import batch_sharding, replicated, state_shardings
from train.images.mixup import draw_mix, mix_images, mix_targets
from train.optim.state import State, trainable

Batch = dict[str, Array]
Metrics = dict[str, Array]

TOP5_CLASSES = 6  # with fewer, top-5 accuracy says nothing


def soft_target_cross_entropy(
    logits: Float[Array, "batch classes"], targets: Float[Array, "batch classes"]
) -> Float[Array, " batch"]:
    """Each image's cross-entropy with a distribution over classes (timm/loss/cross_entropy.py), float32 or wider."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return -jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1)


def within_top(k: int, logits: Float[Array, "batch classes"], labels: Int[Array, " batch"]) -> Bool[Array, " batch"]:
    """Whether fewer than k classes score above the right one. NaN counts as above, so broken logits are not right."""
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    return jnp.sum(~(logits <= own), axis=1) < k


def binary_cross_entropy(
    logits: Float[Array, "batch classes"], targets: Float[Array, "batch classes"]
) -> Float[Array, " batch"]:
    """Each image's mean over the classes of their binary cross-entropies (timm/loss/binary_cross_entropy.py)."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, targets), axis=-1)


_LOSSES = {"softmax": soft_target_cross_entropy, "bce": binary_cross_entropy}


def make_train_step(
    model: nnx.Module, optimizer: optax.GradientTransformation, config: TrainConfig
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """The step (state, batch) -> (state, metrics) of a model. Not jitted, see `jit_train_step`.

    Everything random follows from `config.seed` and the state's step. A batch holds `image` (batch, height, width,
    channels), normalised floats, `label` (batch,), int32, and perhaps `bad` (batch,), int32: -1, or the image that
    could not be read there. Metrics are the means `loss`, over the mixed and smoothed targets, and `top1`, the share of
    images whose largest target was predicted, and the number `bad` of images that could not be read.

    Args:
        model: a CrossViT, or another module with `num_classes`. It gives the structure only, so `abstract_model` is
            enough; the parameters come from the state.
    """
    graphdef = _structure(model, training=True)
    num_classes = model.num_classes
    loss_of_each = _LOSSES[config.loss]

    def loss_and_top1(params: Any, frozen: Any, part: Batch) -> tuple[Array, Array]:
        whole = nnx.merge(graphdef, {**frozen, **params})
        logits = whole(part["image"], rngs=nnx.Rngs(dropout=part["key"]))
        top1 = within_top(1, logits, jnp.argmax(part["targets"], axis=-1))
        loss = jnp.mean(loss_of_each(logits, part["targets"]))
        return loss, jnp.mean(top1.astype(loss.dtype))

    gradient = jax.value_and_grad(loss_and_top1, has_aux=True)

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.seed), state["step"])
        mix_key, dropout_key = jax.random.split(key)
        images, labels = batch["image"], batch["label"]
        mix = draw_mix(mix_key, config, height=images.shape[1], width=images.shape[2])
        images = mix_images(images, mix)
        targets = mix_targets(labels, mix.lam, num_classes=num_classes, smoothing=config.smoothing)

        trained = trainable(state["params"], config)
        frozen = {name: part for name, part in state["params"].items() if name not in trained}
        if config.grad_accum == 1:
            part = {"image": images, "targets": targets, "key": dropout_key}
            (loss, top1), gradients = gradient(trained, frozen, part)
        else:
            parts = {"image": _parts(images, config.grad_accum), "targets": _parts(targets, config.grad_accum)}
            parts["key"] = jax.random.split(dropout_key, config.grad_accum)
            first = jax.eval_shape(gradient, trained, frozen, jax.tree.map(lambda x: x[0], parts))
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)

            def add(sums: Any, part: Batch) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, sums, gradient(trained, frozen, part)), None

            sums, _ = jax.lax.scan(add, zeros, parts)
            (loss, top1), gradients = jax.tree.map(lambda x: x / config.grad_accum, sums)

        updates, opt = optimizer.update(gradients, state["opt"], trained)
        params = {**state["params"], **optax.apply_updates(trained, updates)}
        new = {"params": params, "opt": opt, "step": state["step"] + 1}
        if config.ema_decay:  # timm's ModelEmaV3 without warm-up
            new["ema"] = jax.tree.map(lambda mean, x: mean + (1 - config.ema_decay) * (x - mean), state["ema"], params)
        metrics = {"loss": loss, "top1": top1}
        if "bad" in batch:
            metrics["bad"] = jnp.sum(batch["bad"] >= 0)
        return new, metrics

    return train_step


def _parts(array: Array, parts: int) -> Array:
    """(batch, ...) as (parts, batch / parts, ...). Part j has every so many images from j on: each device, its own."""
    return jnp.swapaxes(array.reshape(array.shape[0] // parts, parts, *array.shape[1:]), 0, 1)


def make_eval_step(model: nnx.Module) -> Callable[[Any, Batch], Metrics]:
    """The function (params, batch) -> sums over the images whose `mask` is 1: `loss`, `top1`, `top5`, `count`.

    The loss is that of the bare labels, without smoothing. `top5` is left out below 6 classes. Not jitted, see
    `jit_eval_step`.

    Args:
        model: as in `make_train_step`.
    """
    graphdef = _structure(model, training=False)
    num_classes = model.num_classes

    def eval_step(params: Any, batch: Batch) -> Metrics:
        logits = nnx.merge(graphdef, params)(batch["image"])
        labels, mask = batch["label"], batch["mask"]
        values = {
            "loss": soft_target_cross_entropy(logits, jax.nn.one_hot(labels, num_classes, dtype=logits.dtype)),
            "top1": within_top(1, logits, labels),
            "top5": within_top(5, logits, labels),
            "count": jnp.ones_like(mask),
        }
        if num_classes < TOP5_CLASSES:
            del values["top5"]
        # where, not a product: whatever the padding gives, even NaN, must not count
        return {name: jnp.sum(jnp.where(mask > 0, value.astype(mask.dtype), 0)) for name, value in values.items()}

    return eval_step


def abstract_batch(image_size: tuple[int, int], batch_size: int, *, masked: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch with shapes instead of arrays: enough to compile a step. Those of evaluation are masked."""
    batch = {
        "image": jax.ShapeDtypeStruct((batch_size, *image_size, 3), jnp.float32),
        "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
        "bad": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    }
    return batch | {"mask": jax.ShapeDtypeStruct((batch_size,), jnp.float32)} if masked else batch


def _structure(model: nnx.Module, *, training: bool) -> nnx.GraphDef:
    """The model without its arrays, in one mode; the mode of the model itself stays as it was."""
    copy = nnx.clone(model)
    copy.train() if training else copy.eval()
    return nnx.graphdef(copy)


def jit_train_step(train_step: Callable[[State, Batch], tuple[State, Metrics]], mesh: Mesh, state: State):
    """The step compiled for a mesh: batch and state cut over the devices, the state's memory used again.

    Args:
        state: the training state, or its shapes.
    """
    shardings = state_shardings(state, mesh)
    return jax.jit(
        train_step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def jit_eval_step(eval_step: Callable[[Any, Batch], Metrics], mesh: Mesh, params: Any):
    """The evaluation step compiled for a mesh.

    Args:
        params: the parameters, or their shapes.
    """
    return jax.jit(
        eval_step,
        in_shardings=(state_shardings(params, mesh), batch_sharding(mesh)),
        out_shardings=replicated(mesh),
    )
