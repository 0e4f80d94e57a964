import numpy as np
import pytest

from train.images.geometry import IGNORED
from train.tasks.segment_rates import mean_segment_rates, segment_confusion, segment_rates


def _confusion(pictures, num_classes):
    return sum(segment_confusion(true, predicted, num_classes) for true, predicted in pictures)


def test_rates_are_those_of_the_pixels_of_the_whole_data_set():
    rng = np.random.default_rng(0)
    pictures = []
    for size in ((30, 40), (7, 90), (50, 50)):
        true = rng.integers(0, 5, size, dtype=np.uint8)
        predicted = np.where(rng.uniform(size=size) < 0.6, true, rng.integers(0, 5, size)).astype(np.uint8)
        true[rng.uniform(size=size) < 0.1] = IGNORED
        pictures.append((true, predicted))
    confusion = _confusion(pictures, 5)
    true, predicted = (np.concatenate([side.ravel() for side in sides]) for sides in zip(*pictures, strict=True))
    true, predicted = true[true != IGNORED], predicted[true != IGNORED]
    sets = [(true == label, predicted == label) for label in range(5)]
    iou = np.array([(one & other).sum() / (one | other).sum() for one, other in sets])
    accuracy = np.array([(one & other).sum() / one.sum() for one, other in sets])
    rates = segment_rates(confusion)
    np.testing.assert_allclose(rates["iou"], iou, rtol=1e-12)
    np.testing.assert_allclose(rates["acc"], accuracy, rtol=1e-12)
    expected = {"miou": iou.mean(), "macc": accuracy.mean(), "aacc": (true == predicted).mean()}
    assert mean_segment_rates(confusion) == pytest.approx(expected, rel=1e-12)


def test_classes_that_are_nowhere_have_no_part_in_the_means():
    true = np.array([[0, 0, 1, IGNORED]], np.uint8)
    predicted = np.array([[0, 1, 1, 3]], np.uint8)
    confusion = segment_confusion(true, predicted, 4)
    assert confusion.sum() == 3
    rates = segment_rates(confusion)
    np.testing.assert_array_equal(rates["iou"], [0.5, 0.5, np.nan, np.nan])
    np.testing.assert_array_equal(rates["acc"], [0.5, 1, np.nan, np.nan])
    assert mean_segment_rates(confusion) == pytest.approx({"miou": 0.5, "macc": 0.75, "aacc": 2 / 3})


def test_a_class_that_is_only_predicted_has_an_iou_of_0():
    confusion = segment_confusion(np.zeros((1, 4), np.uint8), np.array([[0, 0, 2, 2]], np.uint8), 3)
    assert mean_segment_rates(confusion) == pytest.approx({"miou": 0.25, "macc": 0.5, "aacc": 0.5})


def test_without_pixels_there_is_nothing_to_tell():
    assert mean_segment_rates(np.zeros((3, 3), np.int64)) == {}
