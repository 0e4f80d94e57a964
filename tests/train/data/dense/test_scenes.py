import pickle

import numpy as np
import pytest

from train.data.batches import eval_batches, train_batches
from train.data.dense.samples import DenseSource
from train.data.dense.scenes import HELD_OUT_SCENES, MOST_DIGITS, SIDE, TRAIN_SCENES, open_scenes
from train.images.dense import (
    DetectionEvalTransform,
    DetectionTrainTransform,
    SegmentationEvalTransform,
    decoded,
)


@pytest.fixture(scope="module")
def detection():
    return open_scenes("detection", seed=0)


@pytest.fixture(scope="module")
def segmentation():
    return open_scenes("segmentation", seed=0)


def test_boxes_are_tight_around_the_masks_of_their_digits(detection, segmentation):
    alone = 0
    for index in range(200):
        objects, segments = detection.train[index]["objects"], segmentation.train[index]["segments"]
        assert 1 <= len(objects.boxes) <= MOST_DIGITS
        for box, digit, area in zip(objects.boxes, objects.classes, objects.area, strict=True):
            rows, columns = np.nonzero(segments == digit + 1)
            if list(objects.classes).count(digit) > 1 or len(rows) != area:
                continue  # another digit of the same class, or over this one
            alone += 1
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        pixels = decoded(detection.train[index])
        assert pixels.shape == (SIDE, SIDE, 3) and pixels.dtype == np.uint8
        assert pixels[segments > 0].mean() > 2 * pixels[segments == 0].mean()
    assert alone > 250


def test_digits_overlap_little(detection):
    for index in range(200):
        boxes = detection.train[index]["objects"].boxes
        corners = np.maximum(boxes[:, None, :2], boxes[None, :, :2]), np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
        shared = np.prod(np.clip(corners[1] - corners[0], 0, None), axis=-1)
        area = np.diag(shared)
        assert (shared < 0.1 * np.minimum(area[:, None], area))[~np.eye(len(boxes), dtype=bool)].all()


def test_held_out_scenes_hold_no_training_digit_and_are_the_same_for_every_seed(detection):
    other = open_scenes("detection", seed=7)
    assert (len(other.train), len(other.held_out)) == (TRAIN_SCENES, HELD_OUT_SCENES)
    train, held_out = (source.digits.reshape(-1, 64) for source in (detection.train, detection.held_out))
    assert (len(train), len(held_out)) == (1438, 359)
    assert not {digit.tobytes() for digit in train} & {digit.tobytes() for digit in held_out}
    for index in (0, 255):
        assert detection.held_out[index]["image"] == other.held_out[index]["image"]
        assert detection.train[index]["image"] != other.train[index]["image"]
    assert detection.fingerprint == other.fingerprint  # by which evaluations tell what was held out


def test_a_scene_follows_from_its_seed_and_index_alone(detection):
    again = pickle.loads(pickle.dumps(detection.train))
    assert again[10**6]["image"] == detection.train[10**6]["image"] != detection.train[10**6 - 1]["image"]
    truth = detection.train.truth(10**6)
    assert truth["image_id"] == 10**6 and truth["size"] == (SIDE, SIDE)
    np.testing.assert_array_equal(truth["objects"].boxes, again[10**6]["objects"].boxes)
    assert isinstance(again, DenseSource)


def test_each_epoch_has_scenes_of_its_own_and_goes_on_where_the_last_one_ended(detection):
    transform = DetectionTrainTransform((96, 96), most_boxes=detection.most_boxes)
    settings = {"batch_size": 500, "seed": 3, "workers": 0}
    batches = iter(train_batches(detection.train, transform, start_step=3, **settings))
    last, first = next(batches), next(batches)  # of the first epoch, of the second
    for batch, start in ((last, 1500), (first, 2000)):
        assert batch["bad"].tolist() == [-1] * 500
        for place in (0, 499):
            expected = transform(detection.train[start + place], np.random.default_rng(0))
            np.testing.assert_array_equal(batch["image"][place], expected["image"])
            np.testing.assert_array_equal(batch["boxes"][place], expected["boxes"])
    assert {name: array.shape for name, array in last.items() if name in ("boxes", "classes", "present")} == {
        "boxes": (500, 4, 4),
        "classes": (500, 4),
        "present": (500, 4),
    }
    batches.close()


def test_evaluation_goes_through_the_held_out_scenes_in_order(detection, segmentation):
    for sets, transform in (
        (detection, DetectionEvalTransform((96, 96), most_boxes=4)),
        (segmentation, SegmentationEvalTransform((96, 96))),
    ):
        batches = list(eval_batches(sets.held_out, transform, batch_size=100, workers=0, rounds=1))
        mask = np.concatenate([batch["mask"] for batch in batches])
        assert mask.sum() == HELD_OUT_SCENES and mask[:HELD_OUT_SCENES].all()
        expected = transform(sets.held_out[255])
        for name, values in expected.items():
            np.testing.assert_array_equal(batches[2][name][55], values)


def test_segmentation_has_the_background_as_its_first_class(segmentation):
    assert segmentation.class_names == ("background", *"0123456789")
    found = np.unique([segmentation.train[index]["segments"] for index in range(60)])
    assert found.tolist() == list(range(11))
