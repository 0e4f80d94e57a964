"""Image classification: labels, mixed and smoothed targets, accuracies, the confusion matrix."""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

import convert
from convert import load_weights
from convert.changes.adapt import adapt
from convert.errors import ConversionError, SettingsError, listed
from convert.files import check_replaceable, csv_text, shown, write_whole, writing
from convert.weights import Weights
from crossvit_jax import CrossViT, CrossViTConfig, get_config
from train.config import TrainConfig
from train.data.sources import Source, image_labels
from train.images.augment import compile_augment
from train.images.mixup import draw_mix, mix_images, mix_in_groups, mix_targets
from train.pictures.confusion import draw_confusion
from train.pictures.sheet import draw_sheet
from train.tasks.distillation import Teacher, distillation_loss
from train.tasks.evaluated import is_evaluation
from train.tasks.rates import calibration_error, class_rates, mean_rates
from train.tasks.task import Batch, Metric

TOP5_CLASSES = 6  # with fewer, top-5 accuracy says nothing
# what an evaluation leaves
_NUMBERS, _PER_CLASS, _PREDICTIONS = "evaluation.json", "per_class.csv", "predictions.csv"
_CONFUSION, _PICTURE = "confusion.csv", "confusion.png"
_FILES = (_NUMBERS, _PER_CLASS, _PREDICTIONS, _CONFUSION, _PICTURE)
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
    class_weights: tuple[float, ...] | None = None  # in the loss, in the order of the labels; none: all 1
    patch_size: tuple[int, ...] | None = None  # of the patches that `loss` cuts; none: the model's own
    teacher: Teacher | None = None  # that the model follows beside the labels
    entropies: tuple[float, ...] | None = None  # that part the training pictures among several patch sizes

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (_TOP1, _TOP5) if self.model_config.num_classes >= TOP5_CLASSES else (_TOP1,)

    def headline(self) -> str:
        model = self.model_config
        size = " x ".join(map(str, dict.fromkeys(model.image_size)))
        patches = f" in patches of {' or '.join(self.config.patch_sizes)}" if self.config.patch_sizes else ""
        reduced = f", {model.reduce_tokens}" if model.reduce_tokens else ""
        return f"CrossViT {model.name} at {size} pixels{patches}{reduced}, {model.num_classes} classes"

    def model(self, *, dtype: Any, rngs: nnx.Rngs) -> CrossViT:
        return CrossViT(self.model_config, dtype=dtype, rngs=rngs)

    def save(self, params: Any, path: Path, *, origin: str | None = None) -> None:
        about = {"class_names": self.class_names, "exif": self.config.exif, "origin": origin}
        about |= {"patch_sizes": self.config.drawn_patch_sizes, "entropies": self.entropies}
        convert.save(params, self.model_config, path, **about, overwrite=True)

    def transform(self, *, training: bool) -> Callable[..., dict[str, Any]]:
        # late: a machine that only computes may lack the packages that read images
        from train.images.transforms import eval_transform, train_transform

        if training:
            return train_transform(self.config, self.model_config)
        return eval_transform(self.model_config, self.config.exif)

    def batch_shapes(self, batch_size: int, *, training: bool) -> dict[str, jax.ShapeDtypeStruct]:
        image = (*self.model_config.image_size, self.model_config.in_chans)
        batch = {
            "image": jax.ShapeDtypeStruct((batch_size, *image), jnp.float32 if training else jnp.uint8),
            "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
        }
        return batch if training else batch | {"mask": jax.ShapeDtypeStruct((batch_size,), jnp.float32)}

    def augment(self, batch_size: int, mesh: Mesh) -> Callable[[Batch, int], Batch]:
        """The labels stay as they are."""
        compiled = compile_augment((batch_size, *self.model_config.image_size, 3), self.config, mesh)
        return lambda batch, step: {**batch, "image": compiled(batch["image"], step)}

    def prepare(self, batch: Batch, key: Array) -> Batch:
        """Mixup or CutMix; the targets are smoothed distributions over the classes."""
        config, num_classes = self.config, self.model_config.num_classes

        def mix(images: Array, labels: Array, key: Array) -> tuple[Array, Array]:
            drawn = draw_mix(key, config, height=images.shape[1], width=images.shape[2])
            targets = mix_targets(labels, drawn.lam, num_classes=num_classes, smoothing=config.smoothing)
            return mix_images(images, drawn), targets

        images, targets = mix_in_groups(mix, batch["image"], batch["label"], key, group=config.mix_group)
        return {"image": images, "targets": targets}

    def extra(self, params: Any) -> Any:
        """The teacher's parameters."""
        return self.teacher and self.teacher.initial()

    def loss(self, model: nnx.Module, batch: Batch, extra: Any, *, rngs: nnx.Rngs) -> tuple[Array, dict[str, Array]]:
        """Also `top1`: the share of images whose largest target was predicted."""
        sizes = {} if self.patch_size is None else {"patch_size": self.patch_size}
        logits = model(batch["image"], **sizes, rngs=rngs)
        top1 = within_top(1, logits, jnp.argmax(batch["targets"], axis=-1))
        targets = batch["targets"]
        if self.class_weights is not None:  # as torch's cross_entropy weighs targets that are probabilities
            targets = targets * jnp.array(self.class_weights, targets.dtype)
        loss = jnp.mean(_LOSSES[self.config.loss](logits, targets))
        if self.teacher is not None:
            taught = self.teacher.logits(extra, batch["image"], dtype=model.dtype)
            of_labels, of_teacher = self.config.distill_weights
            loss = of_labels * loss + of_teacher * distillation_loss(logits, taught, self.config.distill_temperature)
        return loss, {"top1": jnp.mean(top1.astype(loss.dtype))}

    def update(self, extra: Any, aux: Any, params: Any, step: Array) -> Any:
        return extra

    def evaluate(self, model: nnx.Module, batch: Batch) -> dict[str, Any]:
        """Each image's `label`, `predicted` class, its probability as `confidence`, and `mask`; and `sums` over the
        unmasked images of their `loss` (that of the bare labels), `top1` and from 6 classes on `top5`."""
        logits, labels, mask = model(batch["image"]), batch["label"], batch["mask"]
        one_hot = jax.nn.one_hot(labels, self.model_config.num_classes, dtype=logits.dtype)
        values = {"loss": soft_target_cross_entropy(logits, one_hot), "top1": within_top(1, logits, labels)}
        if _TOP5 in self.metrics:
            values["top5"] = within_top(5, logits, labels)
        # where, not a product: whatever the padding gives, even NaN, must not count
        sums = {name: jnp.sum(jnp.where(mask > 0, value.astype(mask.dtype), 0)) for name, value in values.items()}
        predicted = jnp.argmax(logits, axis=1)
        confidence = jnp.max(jax.nn.softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32))), axis=1)
        return {"label": labels, "predicted": predicted, "confidence": confidence, "mask": mask, "sums": sums}

    def draw_batch(self, batch: Batch, path: Path) -> None:
        """Images before they are mixed, with the names of their classes."""
        names = [self.class_names[label] for label in batch["label"]]
        draw_sheet(batch["image"], names, path, title="the first training images")

    def draw_outputs(self, batch: Batch, outputs: Mapping[str, Any], path: Path) -> None:
        """Images with the names of the classes that they are taken for, and of their own where that is wrong."""
        pairs = zip(outputs["predicted"], outputs["label"], strict=True)
        names = [self.class_names[p] + f", not {self.class_names[t]}" * bool(p != t) for p, t in pairs]
        draw_sheet(batch["image"], names, path, title="held-out images and what they are taken for")

    def scores(self, source: Source) -> "ClassificationScores":
        return ClassificationScores(self.class_names, self.metrics)


class ClassificationScores:
    """Loss and accuracies over the images of a data set, and how often each class was taken for each."""

    def __init__(self, class_names: Sequence[str], metrics: Sequence[Metric]):
        self._class_names, self._metrics = class_names, metrics
        self._sums: dict[str, float] = {}
        self._images: list[dict[str, np.ndarray]] = []  # of each batch
        shape = (len(class_names), len(class_names))
        self.confusion: Int[np.ndarray, "classes classes"] = np.zeros(shape, np.int64)  # by true and predicted class

    def add(self, outputs: Mapping[str, Any]) -> None:
        for name, value in outputs["sums"].items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value)
        self._images.append({name: outputs[name] for name in ("label", "predicted", "confidence", "mask")})
        counted = outputs["mask"] > 0
        np.add.at(self.confusion, (outputs["label"][counted], outputs["predicted"][counted]), 1)

    def values(self) -> dict[str, float]:
        images = int(self.confusion.sum())
        if not images:
            return {"images": 0}
        percent = {metric.name: 100 * self._sums[metric.name] / images for metric in self._metrics}
        return {"images": images, "loss": self._sums["loss"] / images, **percent}

    def details(self) -> dict[str, float]:
        """What is told of an evaluation beside `values`: precision, recall and F1 as means over the classes (`macro`)
        and over the images (`weighted`), and the expected calibration error, all in percent."""
        images = self._of_images()
        counted = images["mask"] > 0
        right = (images["label"] == images["predicted"])[counted]
        error = calibration_error(images["confidence"][counted].astype(np.float64), right)
        return mean_rates(self.confusion) | {"calibration_error": error}

    def _of_images(self) -> dict[str, np.ndarray]:
        """The outputs of each image, in the order of the source; behind them those that filled the last batch."""
        return {name: np.concatenate([batch[name] for batch in self._images]) for name in self._images[0]}

    def check_place(self, folder: Path) -> None:
        """See `train.tasks.task.Scores`: an earlier evaluation in the folder is replaced."""
        check_replaceable([folder / name for name in _FILES], lambda _: is_evaluation(folder / _NUMBERS, "top1"))

    def write(self, folder: Path, *, about: Mapping[str, Any], images: Sequence[str]) -> list[str]:
        """Numbers, rates per class, the prediction for each image, and the confusion matrix as CSV and PNG; its title
        has `weights`, `dataset` and `split` from `about`.

        Args:
            images: the names of those evaluated, in their order. One that could not be read has nothing but its name.
        """
        names, totals, right = list(map(shown, self._class_names)), self.confusion.sum(1), np.diag(self.confusion)
        shares = [f"{100 * r / total:.2f}" if total else "" for r, total in zip(right, totals, strict=True)]
        rates = class_rates(self.confusion)
        precision, f1 = ([f"{rate:.2f}" for rate in rates[name]] for name in ("precision", "f1"))
        header = ("class", "images", "top1", "precision", "f1")
        per_class = [header, *zip(names, totals, shares, precision, f1, strict=True)]
        rows = [(name, *row) for name, row in zip(names, self.confusion, strict=True)]
        values = {"top1": None, "top5": None} | self.values() | self.details()
        texts = {
            _NUMBERS: json.dumps({**about, **values}, indent=2) + "\n",
            _PER_CLASS: csv_text(per_class),
            _PREDICTIONS: csv_text([("image", "class", "predicted", "probability"), *self._predictions(images)]),
            _CONFUSION: csv_text([("true \\ predicted", *names), *rows]),
        }
        for name, text in texts.items():
            write_whole(folder / name, text.encode("utf-8", "surrogateescape"))  # folders may be named in any bytes
        title = f"{Path(about['weights']).name} on {about['dataset']} ({about['split']}): top-1 {values['top1']:.2f} %"
        picture = folder / _PICTURE
        picture.unlink(missing_ok=True)  # it would stay where this one cannot be drawn
        with writing(picture):
            draw_confusion(self.confusion, names, picture, title=title)
        return [name for name in _FILES if (folder / name).exists()]

    def _predictions(self, images: Sequence[str]) -> Iterator[tuple[str, ...]]:
        names = list(map(shown, self._class_names))
        found = zip(*self._of_images().values(), strict=True)  # the batches are longer, see `_of_images`
        for image, (label, predicted, confidence, mask) in zip(images, found, strict=False):
            # a blank image stands for one that could not be read
            yield image, *((names[label], names[predicted], f"{confidence:.6g}") if mask > 0 else ("", "", ""))


# --- labels of a data set and outputs of a model ---


def match_classes(
    data_names: Sequence[str], weight_names: Sequence[str] | None, num_classes: int
) -> tuple[Int[np.ndarray, " classes"], list[str]]:
    """For each label of a data set, the output of the model that stands for it; and what the user should know of that.

    Args:
        data_names: of the data set's classes, in the order of the labels.
        weight_names: of the model's classes, in the order of the outputs; none: not known.
        num_classes: outputs of the model.

    Raises SettingsError if the data set has classes that the model does not have.
    """
    counts = f"the data set has {len(data_names)} classes, the weights have {num_classes}"
    same = np.arange(len(data_names))
    if len(weight_names or data_names) != num_classes:
        raise SettingsError(counts)
    if weight_names is None:
        return same, ["the weights know no class names: output i is taken for the data set's class i"]
    if tuple(data_names) == tuple(weight_names):
        return same, []
    in_data, in_weights = set(data_names), set(weight_names)
    only = {
        "the data set": [name for name in data_names if name not in in_weights],
        "the weights": [name for name in weight_names if name not in in_data],
    }
    counted = Counter(weight_names)
    # a name that stands for two classes tells neither
    if only["the data set"] or len(in_data) < len(data_names) or any(counted[name] > 1 for name in data_names):
        differences = [f"only in {place}: {listed(names[:3], len(names))}" for place, names in only.items() if names]
        raise SettingsError("; ".join([counts, *(differences or ["some have the same name"])]))
    place = {name: index for index, name in enumerate(weight_names)}
    classes = np.array([place[name] for name in data_names])
    notes = []
    if len(classes) < num_classes:
        count = f"{len(classes)} of the {num_classes} classes of the weights"
        notes.append(f"the data set has {count}: to predict one of the others is wrong")
    if (np.diff(classes) < 0).any():
        notes.append("the data set has the weights' classes in another order: they are matched by name")
    return classes, notes


# --- the weights that a run starts from ---


def starting_model(
    config: TrainConfig,
    class_names: tuple[str, ...],
    begun: CrossViTConfig | None,
    *,
    starts_anew: bool,
    carried: Weights | None = None,
) -> tuple[CrossViTConfig, Weights | None]:
    """The model of a run for the classes of a data set, and the weights of `config.init` where it starts from them.

    Args:
        begun: the model of the run that is continued; none: it is a new one.
        starts_anew: there is no checkpoint to continue from.
        carried: the weights of `config.resume`, whose training goes on.

    Raises SettingsError if the settings make no model, or as `initial_weights` does.
    """
    if carried is not None:
        weights = _unchanged(carried, config, class_names)
        return weights.config, weights
    if starts_anew and config.init is not None:
        weights = initial_weights(config, class_names)
        return weights.config, weights
    if begun is None:
        return config.model_config(num_classes=len(class_names)), None
    name = begun.name if config.variant in (None, begun.name) else get_config(config.variant).name
    try:
        return begun.replace(name=name, num_classes=len(class_names), **config.model_overrides()), None
    except ValueError as error:
        raise SettingsError(str(error)) from error


def initial_weights(config: TrainConfig, class_names: tuple[str, ...]) -> Weights:
    """The weights of `config.init` for the classes of a data set and the settings of a run; changes are in `notes`.

    The head is kept if it is known to be, or may be, for these very classes. Position embeddings are resampled for
    another image size, first convolutions adapted to three channels.

    Raises SettingsError if they cannot be read, are of another variant than asked for, or cannot be adapted.
    """
    try:
        overrides = config.model_overrides()
        weights = load_weights(config.init, **({"branches": overrides["branches"]} if config.branches else {}))
        held = weights.config.name
        if config.variant not in (None, held) and get_config(config.variant).name != held:
            raise SettingsError(f"--init {config.init} holds {held}, not the variant {config.variant}")
        weights, notes = _fit_classes(weights, class_names, seed=config.seed)
        weights = adapt(weights, {"in_chans": 3, **overrides}, seed=config.seed)  # runs read colour images
    except (ConversionError, ValueError) as error:
        raise SettingsError(str(error)) from error
    if weights.non_finite():
        raise SettingsError(f"--init {config.init}: {weights.non_finite()}")
    if weights.exif == "apply" and config.exif == "keep":
        notes.append(
            "the weights were trained on images turned by their EXIF orientation, and this run takes them as they are "
            "stored: --exif apply turns them"
        )
    return dataclasses.replace(weights, notes=(*weights.notes, *notes))


def _unchanged(weights: Weights, config: TrainConfig, class_names: tuple[str, ...]) -> Weights:
    """The weights of `config.resume`, if settings and classes change none of their tensors: the optimiser's state could
    not be changed along with them."""
    old, what = weights.config, f"--resume {config.resume}"
    if config.variant not in (None, old.name) and get_config(config.variant).name != old.name:
        raise SettingsError(f"{what} holds {old.name}, not the variant {config.variant}")
    try:
        new = old.replace(num_classes=len(class_names), **config.model_overrides())
    except ValueError as error:
        raise SettingsError(str(error)) from error
    pairs = {
        "classes": (old.num_classes, new.num_classes),
        "patches": (old.grid_size, new.grid_size),
        "channels": (old.in_chans, 3),
    }
    wrong = [f"{there} {name}, and this run has {here}" for name, (there, here) in pairs.items() if there != here]
    if wrong:
        raise SettingsError(f"{what} has {'; '.join(wrong)}: --init begins anew with weights that are made to fit")
    if weights.non_finite():
        raise SettingsError(f"{what}: {weights.non_finite()}")
    note = "the names of its classes are not known: output i is taken for the data set's class i"
    weights = weights.astype(np.dtype(np.float32))  # as the trainer keeps them
    return dataclasses.replace(weights, config=new, notes=(*weights.notes, note))


def _fit_classes(weights: Weights, class_names: tuple[str, ...], *, seed: int) -> tuple[Weights, list[str]]:
    count = len(class_names)
    if weights.config.num_classes != count:
        return adapt(weights, {"num_classes": count}, seed=seed), []
    if weights.class_names is None:
        return weights, [f"the head is kept: it has {count} classes too, and their names are not known"]
    if weights.class_names == class_names:
        return weights, ["the head is kept: it is for these classes"]
    if sorted(weights.class_names) == sorted(class_names) and len(set(class_names)) == count:
        places = [weights.class_names.index(name) for name in class_names]
        tensors = {
            name: array[places] if name.startswith("head.") else array for name, array in weights.tensors.items()
        }
        weights = dataclasses.replace(weights, tensors=tensors, class_names=class_names)
        return weights, ["the head is kept: it is for these classes, and its outputs are put into their order"]
    # by way of no head at all: the number alone would not tell that it must go
    fresh = adapt(adapt(weights, {"num_classes": 0}), {"num_classes": count}, seed=seed)
    note = f"new head: the {count} classes are others than those of the weights"
    return dataclasses.replace(fresh, notes=weights.notes), [note]


# --- losses and accuracies ---


def balanced_weights(source: Source, class_names: Sequence[str]) -> tuple[float, ...]:
    """The weight of each class: images / (classes x images of the class), as scikit-learn balances them.

    Raises SettingsError for a class without images.
    """
    counts = np.bincount(image_labels(source), minlength=len(class_names))
    empty = [shown(name) for name, count in zip(class_names, counts, strict=True) if not count]
    if empty:
        raise SettingsError(
            f"--class-weights balanced: no training image has the class {listed(empty[:5], len(empty))}"
        )
    return tuple((counts.sum() / (len(counts) * counts)).tolist())


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
