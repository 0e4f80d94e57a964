"""Semantic segmentation: a class for each pixel, cross-entropy and Dice, mean intersection over union."""

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
from jaxtyping import Array

import convert
from convert.files import check_replaceable, csv_text, shown, write_whole, writing
from crossvit_jax.config import SegmenterConfig
from crossvit_jax.segmentation import CrossViTSegmenter
from crossvit_jax.segmentation_loss import cross_entropy, dice_loss, mean_valid_pixels
from train.config import TrainConfig
from train.data.dense.samples import DenseSource
from train.images.geometry import IGNORED, classes_in_picture, whole_placement
from train.pictures.confusion import draw_confusion
from train.pictures.dense import legend, pixels_of, save_sheet, sheet_scale, sheet_width, with_segments
from train.pictures.sheet import SHEET_COLUMNS
from train.tasks.evaluated import is_evaluation
from train.tasks.segment_rates import mean_segment_rates, segment_confusion, segment_rates
from train.tasks.task import LATER, Batch, Metric

# what an evaluation leaves
_NUMBERS, _PER_CLASS, _CONFUSION, _PICTURE = "evaluation.json", "per_class.csv", "confusion.csv", "confusion.png"
_FILES = (_NUMBERS, _PER_CLASS, _CONFUSION, _PICTURE)


@dataclass(frozen=True)
class Segmentation:
    """A class for each pixel; see `train.tasks.task.Task`.

    Batches hold `image` (batch, height, width, channels), normalised floats, `segments` (batch, height, width), uint8
    classes or `IGNORED`, and in evaluation `mask` (batch,), float32: 0 for an image that counts nowhere.
    """

    config: TrainConfig
    model_config: SegmenterConfig
    class_names: tuple[str, ...]

    metrics = (
        Metric("miou", "mIoU", better="max"),
        Metric("macc", "mean accuracy"),
        Metric("aacc", "accuracy"),
    )

    def headline(self) -> str:
        model = self.model_config
        size = " x ".join(map(str, dict.fromkeys(model.image_size)))
        return f"CrossViT {model.name} segmenter ({model.decoder}) at {size} pixels, {model.num_classes} classes"

    def model(self, *, dtype: Any, rngs: nnx.Rngs) -> CrossViTSegmenter:
        return CrossViTSegmenter(self.model_config, dtype=dtype, rngs=rngs)

    def save(self, params: Any, path: Path, *, origin: str | None = None) -> None:
        about = {"class_names": self.class_names, "exif": self.config.exif, "origin": origin}
        convert.save(params, self.model_config, path, **about, overwrite=True)

    def transform(self, *, training: bool) -> Callable[..., dict[str, Any]]:
        from train.images.dense import SegmentationEvalTransform, SegmentationTrainTransform

        config, size = self.config, self.model_config.image_size
        if not training:
            return SegmentationEvalTransform(size, config.exif)
        drawn = {name: getattr(config, name) for name in ("scale_jitter", "hflip", "vflip", "color_jitter")}
        return SegmentationTrainTransform(size, **drawn, exif=config.exif)

    def batch_shapes(self, batch_size: int, *, training: bool) -> dict[str, jax.ShapeDtypeStruct]:
        size, image = self.model_config.image_size, jnp.float32 if training else jnp.uint8
        shapes = {"image": ((*size, self.model_config.in_chans), image), "segments": (size, jnp.uint8)}
        shapes |= {} if training else {"mask": ((), jnp.float32)}
        return {name: jax.ShapeDtypeStruct((batch_size, *shape), dtype) for name, (shape, dtype) in shapes.items()}

    def augment(self, batch_size: int, mesh: Mesh) -> Callable[[Batch, int], Batch]:
        raise NotImplementedError("images with masks are augmented on the host")

    def prepare(self, batch: Batch, key: Array) -> Batch:
        """Adds `valid_pixels`, what the cross-entropy is divided by."""
        return {**batch, "valid_pixels": mean_valid_pixels(batch["segments"])}

    def extra(self, params: Any) -> None:
        return None

    def loss(self, model: nnx.Module, batch: Batch, extra: None, *, rngs: nnx.Rngs) -> tuple[Array, dict[str, Array]]:
        """The mean cross-entropy of the pixels that have a class, and what Dice's loss, of these images, adds to it."""
        logits, segments = model(batch["image"], rngs=rngs), batch["segments"]
        loss = cross_entropy(logits, segments, batch["valid_pixels"])
        if self.config.dice:
            loss = loss + self.config.dice * dice_loss(logits, segments)
        return loss, {}

    def update(self, extra: None, aux: Any, params: Any, step: Array) -> None:
        return None

    def found(self, model: nnx.Module, images: Array) -> dict[str, Array]:
        """The `logits` (height, width, classes) of each image."""
        return {"logits": model(images)}

    def evaluate(self, model: nnx.Module, batch: Batch) -> dict[str, Any]:
        """Of each image the `classes` (height, width), uint8, that pixels are taken for, and `mask`; `sums` over the
        unmasked images of the cross-entropy as `loss`, and of the `pixels` that it is to be divided by; and the float32
        logits (height, width, classes), under `LATER` since pictures of the model's size need none."""
        logits, mask = model(batch["image"]), batch["mask"]
        segments = jnp.where(mask[:, None, None] > 0, batch["segments"], IGNORED)
        undivided = jnp.full(mask.shape, 1 / len(mask), mask.dtype)
        loss = cross_entropy(logits, segments, undivided)
        sums = {"loss": loss, "pixels": jnp.sum(segments != IGNORED)}
        return {"classes": jnp.argmax(logits, -1).astype(jnp.uint8), "mask": mask, "sums": sums, LATER: logits}

    def draw_batch(self, batch: Batch, path: Path) -> None:
        """Images with the colours of their pixels' classes."""
        self._draw(batch["image"], [batch["segments"]], path, "the first training images")

    def draw_outputs(self, batch: Batch, outputs: Mapping[str, Any], path: Path) -> None:
        """Images with the colours of the classes that their pixels are taken for, each beside the right ones."""
        title = "held-out images, right classes on the left, on the right those that are predicted"
        self._draw(batch["image"], [batch["segments"], outputs["classes"]], path, title)

    def _draw(self, images: np.ndarray, sides: Sequence[np.ndarray], path: Path, title: str) -> None:
        pixels, scale = pixels_of(images), sheet_scale(*images.shape[1:3])
        pictures = [
            with_segments(pixels[row], segments[row], scale=scale) for row in range(len(pixels)) for segments in sides
        ]
        seen = sorted({int(value) for segments in sides for value in np.unique(segments)} - {IGNORED})
        below = legend(self.class_names, seen, sheet_width(pictures, SHEET_COLUMNS))
        save_sheet(path, pictures, columns=SHEET_COLUMNS, title=title, below=below)

    def scores(self, source: DenseSource) -> "SegmentationScores":
        return SegmentationScores(self, source)


class SegmentationScores:
    """The confusion matrix of all pixels of a source's images, at their own sizes, and the loss."""

    def __init__(self, task: Segmentation, source: DenseSource):
        self._task, self._source = task, source
        self._sums = {"loss": 0.0, "pixels": 0.0}
        self._place = 0  # of the next image
        self._images = 0  # that could be read
        shape = (task.model_config.num_classes,) * 2
        self.confusion = np.zeros(shape, np.int64)  # pixels by true and predicted class

    def add(self, outputs: Mapping[str, Any]) -> None:
        for name in self._sums:
            self._sums[name] += float(outputs["sums"][name])
        canvas, logits = self._task.model_config.image_size, None
        for row, mask in enumerate(outputs["mask"]):
            if mask > 0:
                true = self._source.truth(self._place)["segments"]
                predicted = outputs["classes"][row]
                if true.shape != canvas:
                    logits = np.asarray(outputs[LATER]) if logits is None else logits
                    predicted = classes_in_picture(logits[row], whole_placement(true.shape, canvas))
                self._count(true, predicted)
            self._place += 1

    def add_picture(self, index: int, predicted: np.ndarray) -> None:
        """The classes that the pixels of the picture at a place of the source are taken for."""
        self._count(self._source.truth(index)["segments"], predicted)

    def _count(self, true: np.ndarray, predicted: np.ndarray) -> None:
        self.confusion += segment_confusion(true, predicted, len(self.confusion))
        self._images += 1

    def values(self) -> dict[str, float]:
        """`loss`, the mean cross-entropy of the pixels as the model sees them, if it saw whole pictures, and `miou`,
        `macc` and `aacc`, from 0 to 1, of the pixels of the pictures."""
        if not self._images:
            return {"images": 0}
        loss = {"loss": self._sums["loss"] / max(1.0, self._sums["pixels"])} if self._place else {}
        return {"images": self._images, **loss, **mean_segment_rates(self.confusion)}

    def details(self) -> dict[str, float]:
        return {}

    def lines(self) -> list[str]:
        """Each class's IoU and accuracy."""
        names = [shown(name) for name in self._task.class_names]
        width = max(len(name) for name in ("class", *names))
        rows = zip(names, *segment_rates(self.confusion).values(), strict=True)
        return [
            f"{'class':{width}}     IoU  accuracy",
            *(f"{name:{width}}  {_shown(iou)}    {_shown(accuracy)}" for name, iou, accuracy in rows),
        ]

    def check_place(self, folder: Path) -> None:
        """See `train.tasks.task.Scores`: an earlier evaluation in the folder is replaced."""
        check_replaceable([folder / name for name in _FILES], lambda _: is_evaluation(folder / _NUMBERS, "miou"))

    def write(self, folder: Path, *, about: Mapping[str, Any], images: Sequence[str]) -> list[str]:
        """Numbers, rates of each class, and the confusion matrix of pixels as CSV and PNG."""
        names, rates = list(map(shown, self._task.class_names)), segment_rates(self.confusion)
        pixels = self.confusion.sum(1)
        cells = ([_shown(value).strip("- ") for value in values] for values in rates.values())
        rows = [(name, *row) for name, row in zip(names, self.confusion, strict=True)]
        values = {"miou": None} | self.values()
        texts = {
            _NUMBERS: json.dumps({**about, **values}, indent=2) + "\n",
            _PER_CLASS: csv_text([("class", "pixels", *rates), *zip(names, pixels, *cells, strict=True)]),
            _CONFUSION: csv_text([("true \\ predicted", *names), *rows]),
        }
        for name, text in texts.items():
            write_whole(folder / name, text.encode("utf-8", "surrogateescape"))
        mean = "none" if values["miou"] is None else f"{values['miou']:.3f}"
        title = f"{Path(about['weights']).name} on {about['dataset']} ({about['split']}): mIoU {mean}"
        picture = folder / _PICTURE
        picture.unlink(missing_ok=True)  # it would stay where this one cannot be drawn
        with writing(picture):
            draw_confusion(self.confusion, names, picture, title=title)
        return [name for name in _FILES if (folder / name).exists()]


def _shown(rate: float) -> str:
    """A rate in six characters, or that there is none."""
    return "     -" if np.isnan(rate) else f"{rate:6.4f}"
