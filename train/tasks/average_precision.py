"""Average precision and recall of detections as COCO defines them, by faster-coco-eval: pycocotools' figures, sooner.

A detection is right if its box and one of the truth's, of the same class and not yet found by a better one, overlap by
an intersection over union above a threshold: 0.5, 0.55, … 0.95. Objects marked as crowd are not asked for, and
detections inside of them are not counted.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from train.images.geometry import Boxes

MOST_DETECTIONS = 100  # of a picture, the best ones; COCO's limit

_ANY_IOU, _AREAS = "0.50:0.95", ("all", "small", "medium", "large")


class _Line(NamedTuple):
    """One of COCO's twelve."""

    name: str  # in the log
    what: str  # precision or recall
    iou: str
    area: str
    most: int  # detections of a picture


def _lines(most: int) -> list[_Line]:
    """With so many detections of a picture where COCO has 100."""
    return [
        _Line("ap", "precision", _ANY_IOU, "all", most),
        _Line("ap50", "precision", "0.50", "all", most),
        _Line("ap75", "precision", "0.75", "all", most),
        *(_Line(f"ap_{area}", "precision", _ANY_IOU, area, most) for area in _AREAS[1:]),
        *(_Line(f"ar{few}", "recall", _ANY_IOU, "all", few) for few in (1, 10, most)),
        *(_Line(f"ar_{area}", "recall", _ANY_IOU, area, most) for area in _AREAS[1:]),
    ]


class PrecisionRecall(NamedTuple):
    """The precision that is reached at recalls from 0 to 1, and the score from which on detections reach it."""

    recall: Float[np.ndarray, "101"]
    precision: Float[np.ndarray, "101"]  # 0 where the recall is not reached
    score: Float[np.ndarray, "101"]


class AveragePrecision:
    """Adds up pictures, and then tells COCO's figures, all between 0 and 1.

    A figure of which there is nothing to tell, as of large objects where there are none, is left out.

    Args:
        most_detections: of a picture; the best ones count.
    """

    def __init__(self, num_classes: int, most_detections: int = MOST_DETECTIONS):
        self._num_classes = num_classes
        self._lines, self._limits = _lines(most_detections), [1, 10, most_detections]
        self.by_class_names = ("ap", "ap50", "ap75", f"ar{most_detections}")
        self._images = 0
        self._objects: list[dict[str, Any]] = []
        self._detections: list[dict[str, Any]] = []

    def add(
        self,
        truth: Boxes,
        boxes: Float[np.ndarray, "detections 4"],
        scores: Float[np.ndarray, " detections"],
        classes: Int[np.ndarray, " detections"],
    ) -> None:
        """The next picture: its objects, and what was found, in any order; boxes are x1, y1, x2, y2 in its pixels."""
        self._images += 1
        self.__dict__.pop("_evaluation", None)
        for box, category, crowd, area in zip(*truth, strict=True):
            entry = self._entry(self._objects, box, category) | {"iscrowd": int(crowd), "area": float(area)}
            self._objects.append(entry)
        for box, score, category in zip(boxes, scores, classes, strict=True):
            self._detections.append(self._entry(self._detections, box, category) | {"score": float(score)})

    def _entry(self, others: list[dict[str, Any]], box: np.ndarray, category: int) -> dict[str, Any]:
        x1, y1, x2, y2 = map(float, box)
        width, height = x2 - x1, y2 - y1
        return {
            "id": len(others) + 1,  # 0 would mean: found none
            "image_id": self._images,
            "category_id": int(category),
            "bbox": [x1, y1, width, height],
            "area": width * height,
            "iscrowd": 0,
        }

    def values(self) -> dict[str, float]:
        """By name in the log: `ap` (the mean over IoUs and classes), `ap50`, `ap75`, `ap_small` (below 32² pixels),
        `ap_medium`, `ap_large` (96² and more), and recalls: `ar1`, `ar10`, `ar100` (with so many detections of a
        picture; the last with `most_detections`), `ar_small`, `ar_medium`, `ar_large`."""
        told = ((line.name, self._value(line)) for line in self._lines)
        return {name: value for name, value in told if value is not None}

    def lines(self) -> list[str]:
        """The same as pycocotools prints it; -1 where there is nothing to tell."""
        short, rows = {"precision": "AP", "recall": "AR"}, []
        for line in self._lines:
            value = self._value(line)
            title = f"Average {line.what.capitalize()}"
            rows.append(
                f" {title:<18} ({short[line.what]}) @[ IoU={line.iou:<9} | area={line.area:>6s} | "
                f"maxDets={line.most:>3d} ] = "
                f"{-1 if value is None else value:0.3f}"
            )
        return rows

    def by_class(self) -> list[dict[str, float]]:
        """For each class `by_class_names` as far as there are such objects, and how many `objects`."""
        found = []
        counts = np.bincount(
            [entry["category_id"] for entry in self._objects if not entry["iscrowd"]], minlength=self._num_classes
        )
        chosen = [line for line in self._lines if line.name in self.by_class_names]
        for category, count in enumerate(counts.tolist()):
            told = ((line.name, self._value(line, category)) for line in chosen)
            found.append({"objects": count} | {name: value for name, value in told if value is not None})
        return found

    def curves(self, iou: float = 0.5) -> Iterator[PrecisionRecall | None]:
        """For each class precision over recall at an IoU of COCO's; None for a class without objects."""
        (threshold,) = np.flatnonzero(np.isclose(self._evaluation.params.iouThrs, iou))
        for category in range(self._num_classes):
            precision = self._evaluation.eval["precision"][threshold, :, category, 0, -1]
            score = self._evaluation.eval["scores"][threshold, :, category, 0, -1]
            told = PrecisionRecall(np.asarray(self._evaluation.params.recThrs), precision, score)
            yield None if (precision < 0).all() else told

    def _value(self, line: _Line, category: int | None = None) -> float | None:
        values = self._evaluation.eval[line.what]  # (IoUs, [recalls,] classes, areas, limits)
        values = values[..., _AREAS.index(line.area), self._limits.index(line.most)]
        values = values if category is None else values[..., [category]]
        if line.iou != _ANY_IOU:
            values = values[np.isclose(self._evaluation.params.iouThrs, float(line.iou))]
        values = values[values > -1]
        return float(values.mean()) if values.size else None

    @cached_property
    def _evaluation(self) -> Any:
        from faster_coco_eval import COCO, COCOeval_faster

        about = {
            "images": [{"id": image} for image in range(1, self._images + 1)],
            "categories": [{"id": category, "name": str(category)} for category in range(self._num_classes)],
        }
        sides = (COCO({**about, "annotations": entries}) for entries in (self._objects, self._detections))
        evaluation = COCOeval_faster(*sides, iouType="bbox")
        evaluation.params.maxDets = self._limits
        evaluation.evaluate()
        evaluation.accumulate()
        return evaluation
