"""Masked image modelling: the pixels of masked cells are predicted."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from crossvit_jax.config import CrossViTConfig
from crossvit_jax.config.masking import cell_grid, masked_cells
from crossvit_jax.pretraining.masked import (
    LEAST,
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
from train.tasks.pretraining.scores import PretrainingScores, metrics_of
from train.tasks.pretraining.weights import save_body
from train.tasks.task import Batch, Metric

_DRAWN = 12  # images of a batch whose predictions are kept, for pictures


@dataclass(frozen=True)
class Simmim:
    """Masked image modelling; see `train.tasks.task.Task`.

    Batches hold `image` (batch, height, width, channels), normalised floats, `cells` (batch, rows, columns), which of
    them are masked, and in evaluation `label` (batch,), int32, and `mask` (batch,), float32: 0 for what counts nowhere.
    """

    config: TrainConfig
    model_config: CrossViTConfig  # of the CrossViT, without classes
    class_names: tuple[str, ...]  # of the data; none: they have no labels

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return metrics_of(self.class_names)

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
        save_body(params, self.model_config, path, self.config, origin)

    def transform(self, *, training: bool) -> Masking:
        if training:
            inner = train_transform(self.config, self.model_config)
        else:
            inner = eval_transform(self.model_config, self.config.exif)
        return Masking(inner, self.grid, masked_cells(self.grid, self.config.mask_ratio), self.config.seed)

    def batch_shapes(self, batch_size: int, *, training: bool) -> dict[str, jax.ShapeDtypeStruct]:
        image = (*self.model_config.image_size, self.model_config.in_chans)
        shapes = {"image": (image, jnp.float32 if training else jnp.uint8), "cells": (self.grid, jnp.bool_)}
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

    def scores(self, source: Source) -> PretrainingScores:
        return PretrainingScores(self.class_names, self._mean_loss)

    def _mean_loss(self, sums: dict[str, Any], images: int) -> float:
        """As `masked_loss` of all images at once."""
        return (sums["distance"] / (sums["pixels"] + LEAST)).sum() / self.model_config.in_chans
