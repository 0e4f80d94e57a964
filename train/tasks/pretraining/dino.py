"""Self-distillation: a student learns to say of each crop of a picture what its own average says of another."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from crossvit_jax.config import CrossViTConfig
from crossvit_jax.pretraining.dino import (
    DinoCrossViT,
    cosine_between,
    dino_loss,
    next_centre,
    next_teacher,
)
from crossvit_jax.resize import scale_image
from train.config import TrainConfig
from train.data.sources import Source
from train.images.transforms import EvalTransform, MultiCrop, TrainTransform, eval_transform
from train.pictures.crops import draw_crops, draw_neighbours
from train.tasks.pretraining.scores import PretrainingScores, metrics_of
from train.tasks.pretraining.weights import HEAD, save_body
from train.tasks.task import Batch, Metric, Tree


@dataclass(frozen=True)
class Dino:
    """DINO (arXiv 2104.14294); see `train.tasks.task.Task`.

    Training batches hold `image` (batch, 2, height, width, channels), normalised floats, two large crops of an image,
    and `small` (batch, crops, height / 2, width / 2, channels), if there are such. Those of evaluation hold whole
    images, `image` (batch, height, width, channels), `label` (batch,), int32, and `mask` (batch,), float32: 0 for what
    counts nowhere.

    State of the task's own: the parameters of the `teacher`, which are evaluated and published, the `centre` of what it
    says, and the number of the `step`, by which its momentum is told.
    """

    config: TrainConfig
    model_config: CrossViTConfig  # of the CrossViT, without classes
    class_names: tuple[str, ...]  # of the data; none: they have no labels
    steps_per_epoch: int

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return metrics_of(self.class_names)

    def headline(self) -> str:
        model, crops = self.model_config, self.config.local_crops
        size = " x ".join(map(str, dict.fromkeys(model.image_size)))
        return f"CrossViT {model.name} at {size} pixels without labels (dino, 2 large crops and {crops} small ones)"

    def model(self, *, dtype: Any, rngs: nnx.Rngs) -> DinoCrossViT:
        return DinoCrossViT(self.model_config, self.config.prototypes, **HEAD, dtype=dtype, rngs=rngs)

    def save(self, params: Any, path: Path, *, origin: str | None = None) -> None:
        save_body(params, self.model_config, path, self.config, origin)

    def transform(self, *, training: bool) -> MultiCrop | EvalTransform:
        if not training:
            return eval_transform(self.model_config, self.config.exif)
        size = self.model_config.image_size
        large = TrainTransform(self.config, size)
        of_small = dataclasses.replace(self.config, crop_scale=self.config.local_scale)
        return MultiCrop(large, TrainTransform(of_small, _half(size)), self.config.local_crops)

    def batch_shapes(self, batch_size: int, *, training: bool) -> dict[str, jax.ShapeDtypeStruct]:
        size, channels = self.model_config.image_size, self.model_config.in_chans
        if training:
            shapes = {"image": ((2, *size, channels), jnp.float32)}
            crops = self.config.local_crops
            shapes |= {"small": ((crops, *_half(size), channels), jnp.float32)} if crops else {}
        else:
            shapes = {"image": ((*size, channels), jnp.uint8), "label": ((), jnp.int32), "mask": ((), jnp.float32)}
        return {name: jax.ShapeDtypeStruct((batch_size, *shape), dtype) for name, (shape, dtype) in shapes.items()}

    def augment(self, batch_size: int, mesh: Mesh) -> Callable[[Batch, int], Batch]:
        raise NotImplementedError("several crops of an image are augmented on the host")

    def prepare(self, batch: Batch, key: Array) -> Batch:
        return batch

    def extra(self, params: Tree) -> Tree:
        centre = jnp.zeros(self.config.prototypes, jnp.float32)
        return {"teacher": jax.tree.map(jnp.copy, params), "centre": centre, "step": jnp.zeros((), jnp.int32)}

    def published(self, state: Mapping[str, Tree]) -> Tree:
        """The parameters that are evaluated, and written as the result: the teacher's."""
        return state["extra"]["teacher"]

    def loss(self, model: nnx.Module, batch: Batch, extra: Tree, *, rngs: nnx.Rngs) -> tuple[Array, dict[str, Array]]:
        """The last layer learns nothing in the first epoch. `said` is the mean of what the teacher says."""
        teacher = nnx.merge(nnx.graphdef(model), jax.lax.stop_gradient(extra["teacher"]))
        teacher.eval()
        said = _cosines(teacher, batch["image"])
        kernel = model.head.last_layer.kernel
        is_frozen = extra["step"] < self.steps_per_epoch
        kernel[...] = jnp.where(is_frozen, jax.lax.stop_gradient(kernel[...]), kernel[...])
        student = [_cosines(model, batch[name], rngs=rngs) for name in ("image", "small") if name in batch]
        loss = dino_loss(jnp.concatenate(student), said, extra["centre"])
        return loss, {"said": said.mean((0, 1))}

    def update(self, extra: Tree, aux: Tree, params: Tree, step: Array) -> Tree:
        share = extra["step"] / (self.config.epochs * self.steps_per_epoch)
        momentum = cosine_between(self.config.teacher_momentum, 1.0, share)
        return {
            "teacher": next_teacher(extra["teacher"], params, momentum),
            "centre": next_centre(extra["centre"], aux["said"][None, None]),
            "step": extra["step"] + 1,
        }

    def evaluate(self, model: nnx.Module, batch: Batch) -> dict[str, Any]:
        """Of each image `label`, `mask` and `features`; in `sums` the `loss` over the unmasked ones: that of DINO
        between an image and the same at half its side, with the centre of these images."""
        images, mask = batch["image"], batch["mask"]
        features = model.features(images)
        large = model.head(features)
        small = model(scale_image(images, _half(self.model_config.image_size)))
        counted = (mask > 0)[:, None]
        centre = jnp.where(counted, large, 0).sum(0) / jnp.maximum(1, counted.sum())
        losses = jax.vmap(lambda said, heard: dino_loss(_pair(heard), said[None, None], centre))(large, small)
        loss = jnp.where(mask > 0, losses, 0).sum()
        return {"label": batch["label"], "mask": mask, "features": features, "sums": {"loss": loss}}

    def draw_batch(self, batch: Batch, path: Path) -> None:
        """The crops of each image in a row."""
        draw_crops(batch["image"], batch.get("small"), path, title="crops of the first training images")

    def draw_outputs(self, batch: Batch, outputs: Mapping[str, Any], path: Path) -> None:
        """Images, each beside those of the others drawn whose features are most like its own."""
        title = "held-out images, and the nearest of these"
        draw_neighbours(batch["image"], np.asarray(outputs["features"]), path, title=title)

    def scores(self, source: Source) -> PretrainingScores:
        return PretrainingScores(self.class_names, lambda sums, images: sums["loss"] / images)


def _half(size: tuple[int, int]) -> tuple[int, int]:
    return size[0] // 2, size[1] // 2


def _pair(cosines: Float[Array, " prototypes"]) -> Float[Array, "2 1 prototypes"]:
    """What is said of one crop in the place of the second: `dino_loss` compares no crop with itself."""
    return jnp.stack([jnp.zeros_like(cosines), cosines])[:, None]


def _cosines(
    model: DinoCrossViT, crops: Float[Array, "batch crops _ _ _"], *, rngs: nnx.Rngs | None = None
) -> Float[Array, "crops batch prototypes"]:
    """In one pass."""
    batch, count = crops.shape[:2]
    cosines = model(crops.reshape(batch * count, *crops.shape[2:]), rngs=rngs)
    return cosines.reshape(batch, count, -1).transpose(1, 0, 2)
