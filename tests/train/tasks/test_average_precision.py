import contextlib
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from train.images.geometry import Boxes
from train.tasks.average_precision import AveragePrecision

_NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
_NAMES += ("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large")
_CLASSES = 4


def _pictures(seed, count=30, crowds=True):
    """Objects and detections of pictures: most of them near to one another, some wrong, some missing."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        objects = rng.integers(0, 9)
        corners, sides = rng.uniform(0, 300, (objects, 2)), rng.uniform(5, 150, (objects, 2))
        boxes = np.concatenate([corners, corners + sides], axis=1)
        classes = rng.integers(0, _CLASSES - 1, objects)  # of the last there are none
        crowd = (rng.uniform(size=objects) < 0.2) & crowds
        truth = Boxes(boxes, classes, crowd, np.prod(sides, axis=1) * rng.uniform(0.5, 1, objects))
        again = rng.integers(0, max(objects, 1), rng.integers(0, 130)) if objects else np.zeros(0, int)
        found = boxes[again] + rng.normal(0, 4, (len(again), 4))
        found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
        told = np.where(rng.uniform(size=len(again)) < 0.8, classes[again], rng.integers(0, _CLASSES, len(again)))
        scores = np.round(rng.uniform(size=len(again)), 2)  # with ties
        yield truth, found, scores, told


def _by_pycocotools(pictures):
    """Its evaluation, and the lines that it prints."""
    truths, detections = [], []
    for image, (truth, found, scores, told) in enumerate(pictures, start=1):
        for box, category, crowd, area in zip(*truth, strict=True):
            bbox = [*box[:2], *(box[2:] - box[:2])]
            entry = {"image_id": image, "category_id": int(category), "bbox": bbox, "area": area, "iscrowd": int(crowd)}
            truths.append(entry | {"id": len(truths) + 1})
        for box, score, category in zip(found, scores, told, strict=True):
            bbox = [*box[:2], *(box[2:] - box[:2])]
            detections.append({"image_id": image, "category_id": int(category), "bbox": bbox, "score": score})
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        coco = COCO()
        images = [{"id": image} for image in range(1, len(pictures) + 1)]
        coco.dataset = {"images": images, "annotations": truths}
        coco.dataset["categories"] = [{"id": category} for category in range(_CLASSES)]
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        printed.truncate(0)
        printed.seek(0)
        evaluation.summarize()
    return evaluation, printed.getvalue().splitlines()


@pytest.mark.parametrize("seed, crowds", [(0, True), (1, False)])
def test_the_figures_are_those_of_pycocotools(seed, crowds):
    pictures = list(_pictures(seed, crowds=crowds))
    ours = AveragePrecision(_CLASSES)
    for picture in pictures:
        ours.add(*picture)
    theirs, printed = _by_pycocotools(pictures)
    expected = dict(zip(_NAMES, theirs.stats, strict=True))
    assert ours.values() == pytest.approx(expected, abs=1e-12)
    assert 0.1 < expected["ap"] < 0.9 and min(expected.values()) > 0
    assert ours.lines() == printed
    precision = theirs.eval["precision"][:, :, :, 0, -1]
    for category, values in enumerate(ours.by_class()[: _CLASSES - 1]):
        assert values["ap"] == pytest.approx(precision[..., category].mean(), abs=1e-12)
        assert values["ap50"] == pytest.approx(precision[0, :, category].mean(), abs=1e-12)
        assert values["objects"] == sum(((t.classes == category) & ~t.crowd).sum() for t, *_ in pictures)
    for curve, category in zip(ours.curves(0.75), range(_CLASSES - 1), strict=False):
        np.testing.assert_allclose(curve.precision, precision[5, :, category], atol=1e-12)
        np.testing.assert_allclose(curve.score, theirs.eval["scores"][5, :, category, 0, -1], atol=1e-12)
        assert curve.recall[[0, -1]].tolist() == [0, 1]


def test_figures_of_which_there_is_nothing_to_tell_are_left_out():
    ours = AveragePrecision(2)
    box = np.array([[10.0, 10, 30, 30]])
    ours.add(Boxes(box, np.array([0]), np.array([False]), np.array([400.0])), box, np.ones(1), np.array([0]))
    assert ours.values() == dict.fromkeys(("ap", "ap50", "ap75", "ap_small", "ar1", "ar10", "ar100", "ar_small"), 1.0)
    assert ours.by_class() == [{"objects": 1, "ap": 1.0, "ap50": 1.0, "ap75": 1.0, "ar100": 1.0}, {"objects": 0}]
    assert [curve is None for curve in ours.curves()] == [False, True]
    assert ours.lines()[4].endswith("area=medium | maxDets=100 ] = -1.000")


def test_pictures_without_objects_or_detections_count():
    ours = AveragePrecision(1)
    box, one = np.array([[10.0, 10, 30, 30]]), np.array([0])
    empty = Boxes(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0, bool), np.zeros(0))
    nothing = np.zeros((0, 4)), np.zeros(0), np.zeros(0, int)
    ours.add(Boxes(box, one, np.array([False]), np.array([400.0])), *nothing)
    assert ours.values()["ap"] == 0
    ours.add(Boxes(box, one, np.array([False]), np.array([400.0])), box, np.array([0.5]), one)
    assert ours.values()["ap50"] == pytest.approx(51 / 101)  # half of the recalls are reached
    ours.add(empty, box, np.array([0.9]), one)  # the best detection is wrong
    assert ours.values()["ap50"] == pytest.approx(0.5 * 51 / 101)
