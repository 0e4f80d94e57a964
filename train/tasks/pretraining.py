"""Pre-training without labels: pixels of masked cells are predicted, and features are judged by their neighbours."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

import convert
from convert import load_weights
from convert.adapt import adapt
from convert.dense import body_of
from convert.errors import ConversionError, SettingsError
from convert.files import check_replaceable, write_whole
from convert.tree import flatten
from convert.weights import Weights
from crossvit_jax.config import CrossViTConfig, get_config
from crossvit_jax.config.masking import cell_grid, masked_cells
from crossvit_jax.pretraining.masked import (
    BODY,
    MaskedCrossViT,
    image_patches,
    masked_loss,
    mean_masked_pixels,
    patch_masks,
)
from train.config import TrainConfig
from train.data.sources import Source
from train.images.augment import compile_augment
from train.images.transforms import Masking, eval_transform, train_transform
from train.pictures.reconstruction import draw_masked, draw_reconstructions
from train.tasks.evaluated import is_evaluation
from train.tasks.task import Batch, Metric

_DRAWN = 12  # images of a batch whose predictions are kept, for pictures
_NEIGHBOURS, _TEMPERATURE = 20, 0.07  # DINO's (arXiv 2104.14294)
_AT_A_TIME = 1024  # images that are compared with all others
_NUMBERS = "evaluation.json"


@dataclass(frozen=True)
class Pretraining:
    """Masked image modelling; see `train.tasks.task.Task`.

    Batches hold `image` (batch, height, width, channels), normalised floats, `cells` (batch, rows, columns), which of
    them are masked, and in evaluation `label` (batch,), int32, and `mask` (batch,), float32: 0 for what counts nowhere.
    """

    config: TrainConfig
    model_config: CrossViTConfig  # of the CrossViT, without classes
    class_names: tuple[str, ...]  # of the data; none: they have no labels

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (Metric("knn", "k-NN accuracy", "%", "max"),) if len(self.class_names) > 1 else ()

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of cells in an image."""
        return cell_grid(self.model_config, self.config.mask_cell)

    def headline(self) -> str:
        model, cells = self.model_config, self.grid[0] * self.grid[1]
        size = " x ".join(map(str, dict.fromkeys(model.image_size)))
        masked = f"{masked_cells(self.grid, self.config.mask_ratio)} of {cells} cells masked"
        return f"CrossViT {model.name} at {size} pixels without labels ({self.config.method}, {masked})"

    def model(self, *, dtype: Any, rngs: nnx.Rngs) -> MaskedCrossViT:
        return MaskedCrossViT(self.model_config, dtype=dtype, rngs=rngs)

    def save(self, params: Any, path: Path, *, origin: str | None = None) -> None:
        """Writes the CrossViT alone, and says so."""
        rest = ", ".join(sorted({str(name) for name in params} - {BODY.rstrip(".")}))
        told = f"pre-trained by {self.config.method}, and left out of it: {rest}"
        about = {"exif": self.config.exif, "origin": told if origin is None else f"{origin}; {told}"}
        convert.save(params["body"], self.model_config, path, **about, overwrite=True)

    def transform(self, *, training: bool) -> Masking:
        if training:
            inner = train_transform(self.config, self.model_config)
        else:
            inner = eval_transform(self.model_config, self.config.exif)
        return Masking(inner, self.grid, masked_cells(self.grid, self.config.mask_ratio), self.config.seed)

    def batch_shapes(self, batch_size: int, *, training: bool) -> dict[str, jax.ShapeDtypeStruct]:
        image = (*self.model_config.image_size, self.model_config.in_chans)
        shapes = {"image": (image, jnp.float32), "cells": (self.grid, jnp.bool_)}
        shapes |= {} if training else {"label": ((), jnp.int32), "mask": ((), jnp.float32)}
        return {name: jax.ShapeDtypeStruct((batch_size, *shape), dtype) for name, (shape, dtype) in shapes.items()}

    def augment(self, batch_size: int, mesh: Mesh) -> Callable[[Batch, int], Batch]:
        """The cells stay as they are."""
        compiled = compile_augment((batch_size, *self.model_config.image_size, 3), self.config, mesh)
        return lambda batch, step: {**batch, "image": compiled(batch["image"], step)}

    def prepare(self, batch: Batch, key: Array) -> Batch:
        """Adds `masked_pixels`, what the loss of each branch is divided by."""
        masks = patch_masks(batch["cells"], self.model_config)
        return {**batch, "masked_pixels": mean_masked_pixels(masks, self.model_config)}

    def extra(self, params: Any) -> None:
        return None

    def loss(self, model: nnx.Module, batch: Batch, extra: None, *, rngs: nnx.Rngs) -> tuple[Array, dict[str, Array]]:
        """The mean distance of predicted from masked values, summed over the branches."""
        predictions = model(batch["image"], batch["cells"], rngs=rngs)
        patches = image_patches(batch["image"], self.model_config)
        masks = patch_masks(batch["cells"], self.model_config)
        return masked_loss(predictions, patches, masks, self.model_config, batch["masked_pixels"]), {}

    def update(self, extra: None, aux: Any, params: Any, step: Array) -> None:
        return None

    def evaluate(self, model: nnx.Module, batch: Batch) -> dict[str, Any]:
        """Of each image `label`, `mask`, and, where there are labels, its `features`; `sums` over the unmasked images
        of each branch's distances (`distance`) and masked `pixels`; and the predicted `patches` of the first images."""
        images, mask = batch["image"], batch["mask"]
        predictions = model(images, batch["cells"])
        distances, pixels = [], []
        masks = patch_masks(batch["cells"], self.model_config)
        for prediction, patch, covered in zip(
            predictions, image_patches(images, self.model_config), masks, strict=True
        ):
            # where, not a product: whatever the padding gives, even NaN, must not count
            counted = covered[..., None] & (mask > 0)[:, None, None]
            distances.append(jnp.where(counted, jnp.abs(prediction - patch), 0).sum())
            pixels.append(counted.sum() * (patch.shape[-1] // self.model_config.in_chans))
        outputs = {"label": batch["label"], "mask": mask, "patches": [x[:_DRAWN] for x in predictions]}
        outputs["sums"] = {"distance": jnp.stack(distances), "pixels": jnp.stack(pixels)}
        return outputs | ({"features": model.features(images)} if self.metrics else {})

    def draw_batch(self, batch: Batch, path: Path) -> None:
        """Images, each beside what the model sees of it."""
        draw_masked(batch["image"], batch["cells"], path, title="the first training images, and what is masked")

    def draw_outputs(self, batch: Batch, outputs: Mapping[str, Any], path: Path) -> None:
        """Images, what the model sees of them, and what each branch makes of the rest."""
        title = "held-out images, masked, and the prediction of each branch"
        masks = [np.asarray(mask) for mask in patch_masks(jnp.asarray(batch["cells"]), self.model_config)]
        draw_reconstructions(
            batch["image"], batch["cells"], outputs["patches"], masks, self.model_config, path, title=title
        )

    def scores(self, source: Source) -> "PretrainingScores":
        return PretrainingScores(self)


class PretrainingScores:
    """The loss over all images of a data set, and the k-NN accuracy of their features where they have labels."""

    def __init__(self, task: Pretraining):
        self._task, self._images = task, 0
        self._sums: dict[str, np.ndarray] = {}
        self._features: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []

    def add(self, outputs: Mapping[str, Any]) -> None:
        counted = outputs["mask"] > 0
        self._images += int(counted.sum())
        for name, value in outputs["sums"].items():
            self._sums[name] = self._sums.get(name, 0) + value.astype(np.float64)
        if "features" in outputs:
            self._features.append(outputs["features"][counted])
            self._labels.append(outputs["label"][counted])

    def values(self) -> dict[str, float]:
        """`loss`, and where there are labels `knn`: the share in percent of the images whose class is that of the 20
        nearest others among them."""
        if not self._images:
            return {"images": 0}
        by_branch = self._sums["distance"] / (self._sums["pixels"] + 1e-5) / self._task.model_config.in_chans
        told = {"images": self._images, "loss": float(by_branch.sum())}
        if self._features and self._images > 1:
            features, labels = np.concatenate(self._features), np.concatenate(self._labels)
            predicted = nearest_classes(features, labels, len(self._task.class_names))
            told["knn"] = 100 * float(np.mean(predicted == labels))
        return told

    def details(self) -> dict[str, float]:
        return {}

    def check_place(self, folder: Path) -> None:
        """See `train.tasks.task.Scores`: an earlier evaluation in the folder is replaced."""
        check_replaceable([folder / _NUMBERS], lambda _: is_evaluation(folder / _NUMBERS, "loss"))

    def write(
        self, folder: Path, *, about: Mapping[str, Any], images: Sequence[str], say: Callable[[str], None]
    ) -> list[str]:
        """The numbers."""
        write_whole(folder / _NUMBERS, (json.dumps({**about, **self.values()}, indent=2) + "\n").encode())
        return [_NUMBERS]


def nearest_classes(
    features: Float[np.ndarray, "images dim"],
    labels: Int[np.ndarray, " images"],
    num_classes: int,
    queries: Float[np.ndarray, "queries dim"] | None = None,
) -> Int[np.ndarray, " queries"]:
    """The class of each query by its 20 nearest images, which vote by exp(cosine / 0.07), as DINO evaluates features.

    Args:
        queries: none: the images themselves, each by the others.
    """
    unit = _unit(features)
    asked = unit if queries is None else _unit(queries)
    count = min(_NEIGHBOURS, len(unit) - (queries is None))
    classes = []
    for start in range(0, len(asked), _AT_A_TIME):
        cosines = asked[start : start + _AT_A_TIME] @ unit.T
        if queries is None:
            rows = np.arange(len(cosines))
            cosines[rows, start + rows] = -np.inf
        nearest = np.argpartition(-cosines, count - 1, axis=1)[:, :count]
        votes = np.exp((np.take_along_axis(cosines, nearest, axis=1) - 1) / _TEMPERATURE)
        by_class = np.zeros((len(cosines), num_classes))
        np.add.at(by_class, (np.arange(len(cosines))[:, None], labels[nearest]), votes)
        classes.append(by_class.argmax(1))
    return np.concatenate(classes)


def _unit(x: Float[np.ndarray, "images dim"]) -> Float[np.ndarray, "images dim"]:
    x = np.asarray(x, np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


# --- the weights that a run starts from ---


def starting_model(
    config: TrainConfig, begun: CrossViTConfig | None, *, starts_anew: bool
) -> tuple[CrossViTConfig, Weights | None]:
    """The model of a run, and the weights of `config.init` where it starts from them, with a new decoder.

    Args:
        begun: the model of the run that is continued; none: it is a new one.
        starts_anew: there is no checkpoint to continue from.

    Raises SettingsError if the settings make no model, the weights are not for such a one, or cells do not fit it.
    """
    weights = None
    try:
        if starts_anew and config.init is not None:
            weights = _initial_weights(config)
            model = weights.config
        elif begun is not None:
            name = begun.name if config.variant in (None, begun.name) else get_config(config.variant).name
            model = begun.replace(name=name, **config.model_overrides())
        else:
            model = config.model_config(num_classes=0)
    except (ConversionError, ValueError) as error:
        raise SettingsError(str(error)) from error
    for name, check in (
        ("mask_cell", lambda: cell_grid(model, config.mask_cell)),
        ("mask_ratio", lambda: masked_cells(cell_grid(model, config.mask_cell), config.mask_ratio)),
    ):
        try:
            check()
        except ValueError as error:
            raise SettingsError(f"{name}: {error}") from None
    return model, weights


def _initial_weights(config: TrainConfig) -> Weights:
    overrides = config.model_overrides()
    weights = load_weights(config.init, **({"branches": overrides["branches"]} if config.branches else {}))
    held = weights.config.name
    if config.variant not in (None, held) and get_config(config.variant).name != held:
        raise SettingsError(f"--init {config.init} holds {held}, not the variant {config.variant}")
    weights = adapt(body_of(weights), {"in_chans": 3, **overrides}, seed=config.seed)  # runs read colour images
    if weights.non_finite():
        raise SettingsError(f"--init {config.init}: {weights.non_finite()}")
    fresh = {name: array for name, array in flatten(_draw(weights.config, config.seed)).items()}
    note = f"new for pre-training: {', '.join(sorted({name.split('.')[0] for name in fresh}))}"
    tensors = {f"{BODY}{name}": array.astype(np.float32) for name, array in weights.tensors.items()} | fresh
    return dataclasses.replace(weights, tensors=tensors, notes=(*weights.notes, note))


@functools.partial(jax.jit, static_argnums=(0, 1))  # which leaves out whatever is not returned: the body is not drawn
def _draw(config: CrossViTConfig, seed: int) -> dict[str, Any]:
    model = MaskedCrossViT(config, rngs=nnx.Rngs(seed))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return {name: part for name, part in params.items() if name != BODY.rstrip(".")}
