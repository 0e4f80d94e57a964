"""Image classification: labels, mixed and smoothed targets, accuracies, the confusion matrix."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

import convert
from convert import load_weights
from convert.adapt import adapt
from convert.errors import ConversionError, SettingsError
from convert.weights import Weights
from crossvit_jax import CrossViT, CrossViTConfig, get_config
from train.config import TrainConfig
from train.images.mixup import draw_mix, mix_images, mix_targets
from train.images.transforms import CropTransform, EvalTransform, TrainTransform, eval_transform, train_transform
from train.tasks.task import Batch, Metric

TOP5_CLASSES = 6  # with fewer, top-5 accuracy says nothing
_TOP1, _TOP5 = Metric("top1", "top-1", "%", "max"), Metric("top5", "top-5", "%")


@dataclass(frozen=True)
class Classification:
    """One label per image; see `train.tasks.task.Task`.

    Batches hold `image` (batch, height, width, channels), normalised floats, `label` (batch,), int32, and in evaluation
    `mask` (batch,), float32: 0 for what counts nowhere.
    """

    config: TrainConfig
    model_config: CrossViTConfig
    class_names: tuple[str, ...]  # in the order of the labels

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (_TOP1, _TOP5) if self.model_config.num_classes >= TOP5_CLASSES else (_TOP1,)

    def headline(self) -> str:
        model = self.model_config
        return f"CrossViT {model.name} at {model.image_size[0]} pixels, {model.num_classes} classes"

    def model(self, *, dtype: Any, rngs: nnx.Rngs) -> CrossViT:
        return CrossViT(self.model_config, dtype=dtype, rngs=rngs)

    def save(self, params: Any, path: Path) -> None:
        convert.save(params, self.model_config, path, class_names=self.class_names, overwrite=True)

    def transform(self, *, training: bool) -> TrainTransform | CropTransform | EvalTransform:
        return train_transform(self.config, self.model_config) if training else eval_transform(self.model_config)

    def batch_shapes(self, batch_size: int, *, training: bool) -> dict[str, jax.ShapeDtypeStruct]:
        image = (*self.model_config.image_size, self.model_config.in_chans)
        batch = {
            "image": jax.ShapeDtypeStruct((batch_size, *image), jnp.float32),
            "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
        }
        return batch if training else batch | {"mask": jax.ShapeDtypeStruct((batch_size,), jnp.float32)}

    def prepare(self, batch: Batch, key: Array) -> Batch:
        """Mixup or CutMix; the targets are smoothed distributions over the classes."""
        images, num_classes = batch["image"], self.model_config.num_classes
        mix = draw_mix(key, self.config, height=images.shape[1], width=images.shape[2])
        targets = mix_targets(batch["label"], mix.lam, num_classes=num_classes, smoothing=self.config.smoothing)
        return {"image": mix_images(images, mix), "targets": targets}

    def extra(self, params: Any) -> None:
        return None

    def loss(self, model: nnx.Module, batch: Batch, extra: None, *, rngs: nnx.Rngs) -> tuple[Array, dict[str, Array]]:
        """Also `top1`: the share of images whose largest target was predicted."""
        logits = model(batch["image"], rngs=rngs)
        top1 = within_top(1, logits, jnp.argmax(batch["targets"], axis=-1))
        loss = jnp.mean(_LOSSES[self.config.loss](logits, batch["targets"]))
        return loss, {"top1": jnp.mean(top1.astype(loss.dtype))}

    def update(self, extra: None, aux: Any, params: Any, step: Array) -> None:
        return None

    def evaluate(self, model: nnx.Module, batch: Batch) -> dict[str, Array]:
        """Sums over the unmasked images: `loss` (of the bare labels), `count`, `top1` and from 6 classes on `top5`."""
        logits, labels, mask = model(batch["image"]), batch["label"], batch["mask"]
        one_hot = jax.nn.one_hot(labels, self.model_config.num_classes, dtype=logits.dtype)
        values = {
            "loss": soft_target_cross_entropy(logits, one_hot),
            "top1": within_top(1, logits, labels),
            "top5": within_top(5, logits, labels),
            "count": jnp.ones_like(mask),
        }
        if self.model_config.num_classes < TOP5_CLASSES:
            del values["top5"]
        # where, not a product: whatever the padding gives, even NaN, must not count
        return {name: jnp.sum(jnp.where(mask > 0, value.astype(mask.dtype), 0)) for name, value in values.items()}

    def scores(self) -> "ClassificationScores":
        return ClassificationScores()


class ClassificationScores:
    """Sums over the images of a data set."""

    def __init__(self):
        self._sums: Counter[str] = Counter()

    def add(self, outputs: Mapping[str, Any]) -> None:
        self._sums.update(outputs)

    def values(self) -> dict[str, float]:
        images = float(self._sums["count"])
        if not images:
            return {"images": 0.0}
        percent = {name: 100 * float(self._sums[name]) / images for name in ("top1", "top5") if name in self._sums}
        return {"images": images, "loss": float(self._sums["loss"]) / images, **percent}


# --- the weights that a run starts from ---


def starting_model(
    config: TrainConfig, class_names: tuple[str, ...], begun: CrossViTConfig | None, *, starts_anew: bool
) -> tuple[CrossViTConfig, Weights | None]:
    """The model of a run for the classes of a data set, and the weights of `config.init` where it starts from them.

    Args:
        begun: the model of the run that is continued; none: it is a new one.
        starts_anew: there is no checkpoint to continue from.

    Raises SettingsError if the settings make no model, or as `initial_weights` does.
    """
    if starts_anew and config.init is not None:
        weights = initial_weights(config, class_names)
        return weights.config, weights
    if begun is None:
        return config.model_config(num_classes=len(class_names)), None
    name = get_config(config.variant or begun.name).name
    return dataclasses.replace(begun, name=name, num_classes=len(class_names), **config.model_overrides()), None


def initial_weights(config: TrainConfig, class_names: tuple[str, ...]) -> Weights:
    """The weights of `config.init` for the classes of a data set and the settings of a run; changes are in `notes`.

    The head is kept if it is known to be, or may be, for these very classes. Position embeddings are resampled for
    another image size.

    Raises SettingsError if they cannot be read, are of another variant than asked for, or cannot be adapted.
    """
    try:
        weights = load_weights(config.init)
        if config.variant is not None and get_config(config.variant).name != weights.config.name:
            raise SettingsError(f"--init {config.init} holds {weights.config.name}, not the variant {config.variant}")
        weights, notes = _fit_classes(weights, class_names, seed=config.seed)
        weights = adapt(weights, config.model_overrides(), seed=config.seed)
    except (ConversionError, ValueError) as error:
        raise SettingsError(str(error)) from error
    if weights.non_finite():
        raise SettingsError(f"--init {config.init}: {weights.non_finite()}")
    return dataclasses.replace(weights, notes=(*weights.notes, *notes))


def _fit_classes(weights: Weights, class_names: tuple[str, ...], *, seed: int) -> tuple[Weights, list[str]]:
    count = len(class_names)
    if weights.config.num_classes != count:
        return adapt(weights, {"num_classes": count}, seed=seed), []
    if weights.class_names is None:
        return weights, [f"the head is kept: it has {count} classes too, and their names are not known"]
    if weights.class_names == class_names:
        return weights, ["the head is kept: it is for these classes"]
    # by way of no head at all: the number alone would not tell that it must go
    fresh = adapt(adapt(weights, {"num_classes": 0}), {"num_classes": count}, seed=seed)
    note = f"new head: the {count} classes are others than those of the weights"
    return dataclasses.replace(fresh, notes=weights.notes), [note]


# --- losses and accuracies ---


def soft_target_cross_entropy(
    logits: Float[Array, "batch classes"], targets: Float[Array, "batch classes"]
) -> Float[Array, " batch"]:
    """Each image's cross-entropy with a distribution over classes (timm/loss/cross_entropy.py), float32 or wider."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return -jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1)


def binary_cross_entropy(
    logits: Float[Array, "batch classes"], targets: Float[Array, "batch classes"]
) -> Float[Array, " batch"]:
    """Each image's mean over the classes of their binary cross-entropies (timm/loss/binary_cross_entropy.py)."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, targets), axis=-1)


_LOSSES: dict[str, Callable[..., Array]] = {"softmax": soft_target_cross_entropy, "bce": binary_cross_entropy}


def within_top(k: int, logits: Float[Array, "batch classes"], labels: Int[Array, " batch"]) -> Bool[Array, " batch"]:
    """Whether fewer than k classes score above the right one. NaN counts as above, so broken logits are not right."""
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    return jnp.sum(~(logits <= own), axis=1) < k
