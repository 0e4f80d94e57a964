"""Object detection: boxes with classes, FCOS's losses, COCO's average precision."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

import convert
from convert.files import check_replaceable, csv_text, shown, write_whole, writing
from crossvit_jax.boxes import Points, make_points
from crossvit_jax.config import DetectorConfig
from crossvit_jax.detection import CrossViTDetector, detections_of
from crossvit_jax.detection_loss import assign, detection_losses, mean_positives
from train.config import TrainConfig
from train.data.dense.samples import DenseSource
from train.images.geometry import Placement, boxes_in_picture, whole_placement
from train.pictures.dense import pixels_of, save_sheet, sheet_scale, with_boxes
from train.pictures.precision_recall import draw_precision_recall
from train.pictures.sheet import SHEET_COLUMNS
from train.tasks.average_precision import MOST_DETECTIONS, AveragePrecision
from train.tasks.evaluated import is_evaluation
from train.tasks.task import Batch, Metric

# what an evaluation leaves
_NUMBERS, _PER_CLASS, _DETECTIONS, _PICTURE = "evaluation.json", "per_class.csv", "detections.json", "precision.png"
_FILES = (_NUMBERS, _PER_CLASS, _DETECTIONS, _PICTURE)
_FOUND = ("boxes", "scores", "labels", "valid")
SHOWN_SCORE = 0.3  # of boxes that are drawn
_NO_LOGIT = -1e4  # of a padded image, or a class that is not wanted: probabilities are 0, and so are losses


@dataclass(frozen=True)
class Detection:
    """Objects with boxes; see `train.tasks.task.Task`.

    Batches hold `image` (batch, height, width, channels), normalised floats, `boxes` (batch, boxes, 4), float32, x1 y1
    x2 y2 in pixels of the image, `classes` (batch, boxes), int32, `present` (batch, boxes), bool, and in evaluation
    `mask` (batch,), float32: 0 for an image that counts nowhere.
    """

    config: TrainConfig
    model_config: DetectorConfig
    class_names: tuple[str, ...]
    most_boxes: int = 1  # places for the boxes of an image
    category_ids: tuple[int | None, ...] = ()  # by which the data set names the classes, where it has them
    score_threshold: float = 0.05
    iou_threshold: float = 0.6
    max_detections: int = MOST_DETECTIONS
    wanted: tuple[int, ...] | None = None  # classes of which objects are found; none: all

    metrics = (
        Metric("ap", "AP", better="max"),
        Metric("ap50", "AP50"),
        Metric("ap75", "AP75"),
    )

    def headline(self) -> str:
        model = self.model_config
        size = " x ".join(map(str, dict.fromkeys(model.image_size)))
        return f"CrossViT {model.name} detector at {size} pixels, {model.num_classes} classes"

    def model(self, *, dtype: Any, rngs: nnx.Rngs) -> CrossViTDetector:
        return CrossViTDetector(self.model_config, dtype=dtype, rngs=rngs)

    def save(self, params: Any, path: Path, *, origin: str | None = None) -> None:
        about = {"class_names": self.class_names, "exif": self.config.exif, "origin": origin}
        convert.save(params, self.model_config, path, **about, overwrite=True)

    def transform(self, *, training: bool) -> Callable[..., dict[str, Any]]:
        from train.images.dense import DetectionEvalTransform, DetectionTrainTransform

        config, shared = self.config, {"exif": self.config.exif, "most_boxes": self.most_boxes}
        if not training:
            return DetectionEvalTransform(self.model_config.image_size, **shared)
        drawn = {name: getattr(config, name) for name in ("scale_jitter", "hflip", "vflip", "color_jitter")}
        return DetectionTrainTransform(self.model_config.image_size, **drawn, **shared)

    def batch_shapes(self, batch_size: int, *, training: bool) -> dict[str, jax.ShapeDtypeStruct]:
        image, boxes = (*self.model_config.image_size, self.model_config.in_chans), (self.most_boxes,)
        shapes = {
            "image": (image, jnp.float32 if training else jnp.uint8),
            "boxes": ((*boxes, 4), jnp.float32),
            "classes": (boxes, jnp.int32),
            "present": (boxes, jnp.bool),
        }
        shapes |= {} if training else {"mask": ((), jnp.float32)}
        return {name: jax.ShapeDtypeStruct((batch_size, *shape), dtype) for name, (shape, dtype) in shapes.items()}

    def augment(self, batch_size: int, mesh: Mesh) -> Callable[[Batch, int], Batch]:
        raise NotImplementedError("images with boxes are augmented on the host")

    @cached_property
    def _points(self) -> Points:
        return make_points(self.model_config)

    def prepare(self, batch: Batch, key: Array) -> Batch:
        """Adds `positives`, what the losses are divided by."""
        return {**batch, "positives": mean_positives(self._points, batch)}

    def extra(self, params: Any) -> None:
        return None

    def loss(self, model: nnx.Module, batch: Batch, extra: None, *, rngs: nnx.Rngs) -> tuple[Array, dict[str, Array]]:
        """The sum of the three losses, and each of them by its name."""
        losses = detection_losses(model(batch["image"], rngs=rngs), batch, self._points, batch["positives"])
        return sum(losses.values()), losses

    def update(self, extra: None, aux: Any, params: Any, step: Array) -> None:
        return None

    def found(self, model: nnx.Module, images: Array) -> dict[str, Array]:
        """Each image's detections in its pixels, see `detections_of`."""
        return self._found(model(images))

    def _found(self, outputs: Mapping[str, Array]) -> dict[str, Array]:
        names = ("score_threshold", "iou_threshold", "max_detections")
        settings = {name: getattr(self, name) for name in names}
        if self.wanted is not None:  # before the best are chosen: others take no place among them
            logits = outputs["cls_logits"]
            found = np.isin(np.arange(logits.shape[-1]), self.wanted)
            outputs = {**outputs, "cls_logits": jnp.where(found, logits, _NO_LOGIT)}
        return detections_of(outputs, self._points, self.model_config.image_size, **settings)

    def evaluate(self, model: nnx.Module, batch: Batch) -> dict[str, Any]:
        """Each image's detections, see `detections_of`, and `mask`; and `sums` over the unmasked images of the `loss`
        and of the `positives` that it is to be divided by."""
        outputs, mask = model(batch["image"]), batch["mask"]
        logits = jnp.where(mask[:, None, None] > 0, outputs["cls_logits"], _NO_LOGIT)
        outputs = {**outputs, "cls_logits": logits}
        found = self._found(outputs)
        undivided = jnp.full(mask.shape, 1 / mask.shape[0], mask.dtype)
        loss = sum(detection_losses(outputs, batch, self._points, undivided).values())
        positives = jnp.sum(assign(self._points, batch["boxes"], batch["present"]) >= 0)
        return {**found, "mask": mask, "sums": {"loss": loss, "positives": positives}}

    def draw_batch(self, batch: Batch, path: Path) -> None:
        """Images with their boxes."""
        images = pixels_of(batch["image"])
        rows = zip(batch["boxes"], batch["classes"], batch["present"], strict=True)
        found = [(boxes[present], classes[present], None) for boxes, classes, present in rows]
        self._draw(images, found, path, "the first training images")

    def draw_outputs(self, batch: Batch, outputs: Mapping[str, Any], path: Path) -> None:
        """Images with the boxes that are found with a score of 0.3 or more."""
        images, found = pixels_of(batch["image"]), []
        for row in range(len(images)):
            kept = outputs["valid"][row] & (outputs["scores"][row] >= SHOWN_SCORE)
            found.append(tuple(outputs[name][row][kept] for name in ("boxes", "labels", "scores")))
        self._draw(images, found, path, "held-out images and what is found in them")

    def _draw(self, images: np.ndarray, found: Sequence[tuple[Any, Any, Any]], path: Path, title: str) -> None:
        scale = sheet_scale(*images.shape[1:3])
        pictures = [
            with_boxes(pixels, boxes, classes, self.class_names, scores=scores, scale=scale)
            for pixels, (boxes, classes, scores) in zip(images, found, strict=True)
        ]
        save_sheet(path, pictures, columns=SHEET_COLUMNS, title=title)

    def scores(self, source: DenseSource) -> "DetectionScores":
        return DetectionScores(self, source)


class DetectionScores:
    """COCO's figures and the loss over the images of a source, in its order."""

    def __init__(self, task: Detection, source: DenseSource):
        self._task, self._source = task, source
        self._precision = AveragePrecision(len(task.class_names), max(task.max_detections, MOST_DETECTIONS))
        self._sums = {"loss": 0.0, "positives": 0.0}
        self._place = 0  # of the next image
        self._images = 0  # that could be read
        self._results: list[dict[str, Any]] = []  # as COCO's own programs take them

    def add(self, outputs: Mapping[str, Any]) -> None:
        for name in self._sums:
            self._sums[name] += float(outputs["sums"][name])
        for row, mask in enumerate(outputs["mask"]):
            if mask > 0:
                truth = self._source.truth(self._place)
                placement = whole_placement(truth["size"], self._task.model_config.image_size)
                self._count(truth, *boxes_found({name: outputs[name][row] for name in _FOUND}, placement))
            self._place += 1

    def add_picture(self, index: int, boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> None:
        """What is found in the picture at a place of the source; boxes are x1, y1, x2, y2 in its pixels."""
        self._count(self._source.truth(index), boxes, scores, labels)

    def _count(self, truth: Mapping[str, Any], boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> None:
        self._precision.add(truth["objects"], boxes, scores, labels)
        self._results += coco_results(truth["image_id"], boxes, scores, labels, self._task.category_ids)
        self._images += 1

    def values(self) -> dict[str, float]:
        """`loss` per matched point, if the model saw whole pictures, and the figures of `AveragePrecision.values`."""
        if not self._images:
            return {"images": 0}
        loss = {"loss": self._sums["loss"] / max(1.0, self._sums["positives"])} if self._place else {}
        return {"images": self._images, **loss, **self._precision.values()}

    def details(self) -> dict[str, float]:
        return {}

    def lines(self) -> list[str]:
        """COCO's twelve lines, where more boxes of a picture are wanted than its 100, with so many."""
        return self._precision.lines()

    def check_place(self, folder: Path) -> None:
        """See `train.tasks.task.Scores`: an earlier evaluation in the folder is replaced."""
        check_replaceable([folder / name for name in _FILES], lambda _: is_evaluation(folder / _NUMBERS, "ap"))

    def write(self, folder: Path, *, about: Mapping[str, Any], images: Sequence[str]) -> list[str]:
        """Numbers, those of each class, all detections as COCO's results, and the curves of precision over recall."""
        columns, values = ("objects", *self._precision.by_class_names), {"ap": None} | self.values()
        rows = [
            (shown(name), *("" if row.get(column) is None else f"{row[column]:.6g}" for column in columns))
            for name, row in zip(self._task.class_names, self._precision.by_class(), strict=True)
        ]
        texts = {
            _NUMBERS: json.dumps({**about, **values}, indent=2) + "\n",
            _PER_CLASS: csv_text([("class", *columns), *rows]),
            _DETECTIONS: json.dumps(self._results) + "\n",
        }
        for name, text in texts.items():
            write_whole(folder / name, text.encode("utf-8", "surrogateescape"))
        mean = "none" if values["ap"] is None else f"{values['ap']:.3f}"
        title = f"{Path(about['weights']).name} on {about['dataset']} ({about['split']}): AP {mean}"
        picture = folder / _PICTURE
        picture.unlink(missing_ok=True)  # it would stay where this one cannot be drawn
        curves = [curve and (curve.recall, curve.precision) for curve in self._precision.curves()]
        with writing(picture):
            draw_precision_recall(curves, self._task.class_names, picture, title=title)
        return [name for name in _FILES if (folder / name).exists()]


def boxes_found(
    outputs: Mapping[str, np.ndarray], placement: Placement
) -> tuple[Float[np.ndarray, "boxes 4"], Float[np.ndarray, " boxes"], Int[np.ndarray, " boxes"]]:
    """Boxes, scores and classes of a picture, from what `Detection.found` tells of it on its canvas; boxes are x1, y1,
    x2, y2 in pixels of the picture, float64."""
    boxes, scores, labels, valid = (outputs[name] for name in _FOUND)
    return boxes_in_picture(boxes[valid].astype(np.float64), placement), scores[valid], labels[valid]


def coco_results(
    image_id: int, boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, category_ids: Sequence[int | None]
) -> list[dict[str, Any]]:
    """Detections of a picture as COCO's result format has them: boxes are x, y, width, height in its pixels.

    Args:
        category_ids: of the classes; none for those that the data set does not have, and that are left out.
    """
    return [
        {
            "image_id": image_id,
            "category_id": category_ids[label],
            "bbox": [round(float(value), 3) for value in (x1, y1, x2 - x1, y2 - y1)],
            "score": round(float(score), 6),
        }
        for (x1, y1, x2, y2), score, label in zip(boxes, scores, labels, strict=True)
        if category_ids[label] is not None
    ]
