"""Windows of large pictures, and one answer from what is found in each."""

import numpy as np
import pytest
import torch
from torchvision.ops import batched_nms

from train.images.tiles import ClassesOfWindows, Tiling, Window, joined, suppress, windows


@pytest.mark.parametrize("size", [(100, 150), (48, 48), (30, 200), (20, 10), (97, 49), (1, 1)])
@pytest.mark.parametrize("tiling", [Tiling(48, 0.25), Tiling(48, 0.0), Tiling(48, 0.9), Tiling(1, 0.5)])
def test_windows_cover_the_picture_and_stay_inside(size, tiling):
    covered = np.zeros(size, int)
    cut = list(windows(size, tiling))
    for top, left, height, width in cut:
        assert (height, width) == tuple(min(tiling.side, side) for side in size)
        part = covered[top : top + height, left : left + width]
        assert top >= 0 and left >= 0 and part.shape == (height, width)
        part += 1
    assert covered.min() == 1
    assert cut == sorted(cut) and len(set(cut)) == len(cut)


def test_neighbouring_windows_overlap_as_asked_for_and_the_last_ones_are_moved_inside():
    assert list(windows((40, 100), Tiling(40, 0.25))) == [Window(0, left, 40, 40) for left in (0, 30, 60)]
    assert list(windows((40, 95), Tiling(40, 0.25))) == [Window(0, left, 40, 40) for left in (0, 30, 55)]
    assert list(windows((30, 20), Tiling(40, 0.25))) == [Window(0, 0, 30, 20)]


@pytest.mark.parametrize("most", [10, 1000])
def test_suppression_is_torchvisions_within_each_class(most):
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 100, (400, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(5, 40, (400, 2))], axis=1)
    scores, classes = rng.permutation(400) / 400, rng.integers(0, 3, 400)
    right = batched_nms(*map(torch.from_numpy, (boxes, scores, classes)), 0.4).numpy()[:most]
    ours = suppress(boxes, scores, classes, iou_threshold=0.4, most=most)
    np.testing.assert_array_equal(ours, right)
    assert 10 <= len(ours) < 400
    none = suppress(boxes[:0], scores[:0], classes[:0], iou_threshold=0.4, most=most)
    assert none.shape == (0,)


def test_boxes_of_several_windows_are_suppressed_and_those_of_one_stay():
    first = (np.array([[0.0, 0, 10, 10], [30, 0, 40, 10]]), np.array([0.5, 0.4]), np.array([0, 1]))
    second = (np.array([[1.0, 0, 11, 10], [1, 0, 11, 10]]), np.array([0.9, 0.3]), np.array([0, 1]))
    boxes, scores, classes = joined([first, second], iou_threshold=0.6, most=100)
    assert boxes.tolist() == [[1, 0, 11, 10], [30, 0, 40, 10], [1, 0, 11, 10]]
    assert (scores.tolist(), classes.tolist()) == ([0.9, 0.4, 0.3], [0, 1, 1])
    assert len(joined([first, second], iou_threshold=0.6, most=2)[0]) == 2
    alike = tuple(np.concatenate([array, array]) for array in first)
    assert joined([alike], iou_threshold=0.6, most=1) is alike


@pytest.mark.parametrize("size", [(70, 90), (48, 90), (20, 30), (130, 48)])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.7])
def test_classes_are_those_of_the_mean_logits_of_all_windows_of_a_pixel(size, overlap):
    rng = np.random.default_rng(0)
    tiling = Tiling(48, overlap)
    sums, counts = np.zeros((*size, 5)), np.zeros((*size, 1))
    classes = ClassesOfWindows(size)
    for window in windows(size, tiling):
        top, left, height, width = window
        logits = rng.normal(size=(height, width, 5))
        classes.add(window, logits)
        sums[top : top + height, left : left + width] += logits
        counts[top : top + height, left : left + width] += 1
    found = classes.classes()
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, (sums / counts).argmax(-1))


def test_only_the_rows_of_a_window_are_kept_as_logits():
    size = (400, 30)
    classes = ClassesOfWindows(size)
    for window in windows(size, Tiling(20, 0.25)):
        classes.add(window, np.zeros((window.height, window.width, 3)))
        kept = sum(array.nbytes for array in vars(classes).values() if isinstance(array, np.ndarray))
        assert kept <= 20 * 30 * 3 * 8
    assert classes.classes().shape == size
