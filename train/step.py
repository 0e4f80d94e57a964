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
from train.mixup import draw_mix, mix_images, mix_targets
from train.sharding import batch_sharding, replicated
from train.state import State

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


def make_train_step(
    model: nnx.Module, optimizer: optax.GradientTransformation, config: TrainConfig
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """The step (state, batch) -> (state, metrics) of a model. Not jitted, see `jit_train_step`.

    Everything random follows from `config.seed` and the state's step. A batch holds `image` (batch, height, width,
    channels), normalised floats, and `label` (batch,), int32. Metrics are the means `loss`, over the mixed and smoothed
    targets, and `top1`, the share of images whose largest target was predicted.

    Args:
        model: a CrossViT, or another module with `num_classes`. It gives the structure only, so `abstract_model` is
            enough; the parameters come from the state.
    """
    graphdef = _structure(model, training=True)
    num_classes = model.num_classes

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.seed), state["step"])
        mix_key, dropout_key = jax.random.split(key)
        images, labels = batch["image"], batch["label"]
        mix = draw_mix(mix_key, config, height=images.shape[1], width=images.shape[2])
        images = mix_images(images, mix)
        targets = mix_targets(labels, mix.lam, num_classes=num_classes, smoothing=config.smoothing)

        def mean_loss(params: Any) -> tuple[Array, Array]:
            logits = nnx.merge(graphdef, params)(images, rngs=nnx.Rngs(dropout=dropout_key))
            return jnp.mean(soft_target_cross_entropy(logits, targets)), logits

        (loss, logits), gradients = jax.value_and_grad(mean_loss, has_aux=True)(state["params"])
        updates, opt = optimizer.update(gradients, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        top1 = jnp.mean(within_top(1, logits, jnp.argmax(targets, axis=-1)).astype(loss.dtype))
        return {"params": params, "opt": opt, "step": state["step"] + 1}, {"loss": loss, "top1": top1}

    return train_step


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
    }
    return batch | {"mask": jax.ShapeDtypeStruct((batch_size,), jnp.float32)} if masked else batch


def _structure(model: nnx.Module, *, training: bool) -> nnx.GraphDef:
    """The model without its arrays, in one mode; the mode of the model itself stays as it was."""
    copy = nnx.clone(model)
    copy.train() if training else copy.eval()
    return nnx.graphdef(copy)


def jit_train_step(train_step: Callable[[State, Batch], tuple[State, Metrics]], mesh: Mesh):
    """The step compiled for a mesh: batch cut over the devices, state on each of them, its memory used again."""
    whole = replicated(mesh)
    return jax.jit(
        train_step, in_shardings=(whole, batch_sharding(mesh)), out_shardings=(whole, whole), donate_argnums=0
    )


def jit_eval_step(eval_step: Callable[[Any, Batch], Metrics], mesh: Mesh):
    """The evaluation step compiled for a mesh."""
    whole = replicated(mesh)
    return jax.jit(eval_step, in_shardings=(whole, batch_sharding(mesh)), out_shardings=whole)
