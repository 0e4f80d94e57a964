"""A confusion matrix shows every confusion, whatever the number of classes and their names."""

import numpy as np
import pytest

from tests.train.pictures.pixels import pixels_of
from train.pictures import confusion as pictures
from train.pictures.confusion import draw_confusion


def _confusion(classes, images=20):
    return np.eye(classes, dtype=np.int64) * images


def test_a_confusion_matrix_of_few_classes_has_its_counts_and_names(tmp_path):
    def drawn(confusion, names):
        draw_confusion(confusion, names, tmp_path / "confusion.png", title="x")
        return pixels_of(tmp_path / "confusion.png")

    right = drawn(_confusion(3), ["a", "b", "c"])
    doubled = drawn(2 * _confusion(3), ["a", "b", "c"])  # the same shares and colours, but other counts
    assert (right != doubled).any()
    renamed = drawn(_confusion(3), ["a", "b", "d"])
    assert (right != renamed).any()


@pytest.mark.parametrize("classes", [3, 60, 1000])
def test_a_single_confusion_can_be_seen_among_many_classes(tmp_path, monkeypatch, classes):
    monkeypatch.setattr(pictures, "_MOST_CELLS", 400)  # so that classes share cells
    monkeypatch.setattr(pictures, "_PAIRS", 0)  # the matrix itself, not the list beside it
    names = [str(i) for i in range(classes)]
    confusion = _confusion(classes, images=50)
    confusion[-1] = 0  # a class without images
    drawn = []
    for _ in range(2):
        draw_confusion(confusion, names, tmp_path / "confusion.png", title="x")
        drawn.append(pixels_of(tmp_path / "confusion.png"))
        confusion[0, 0] -= 1
        confusion[0, classes // 2] += 1
    assert all(max(picture.shape) < 2500 for picture in drawn)
    assert (np.abs(drawn[0] - drawn[1]).sum(-1) > 60).sum() >= 2


def test_names_of_any_kind_are_drawn(tmp_path):
    names = ["$", "a$b_{$", "a\nb", "\udcff", "犬", "x" * 300]
    draw_confusion(_confusion(6), names, tmp_path / "confusion.png", title="\udcff $x$")
    assert max(pixels_of(tmp_path / "confusion.png").shape) < 1500


def test_the_most_frequent_confusions_are_listed_first():
    confusion = _confusion(4)
    confusion[0, 1], confusion[2, 3], confusion[3, 0] = 2, 9, 5
    listed = [(int(true), int(predicted)) for _, _, true, predicted in pictures._most_confused(confusion)]
    assert listed == [(2, 3), (3, 0), (0, 1)]
