"""Pictures of results: there whole, with what they should show, and never in the way of a run."""

import os
import sys

import numpy as np
import pytest
from PIL import Image

import train.pictures.figure
from train.pictures.figure import draw_confusion, draw_curves

_BLUE, _ORANGE, _GREEN = (0x4C, 0x72, 0xB0), (0xDD, 0x84, 0x52), (0x55, 0xA8, 0x68)


def _pixels(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def _has(pixels, colour):
    return bool((np.abs(pixels - colour).sum(-1) < 8).any())


def _training(step, epoch=1):
    return {"step": step, "epoch": epoch, "train/loss": 2 / step, "train/top1": 3.0 * step, "train/lr": 1e-3}


def _evaluation(step, epoch, **more):
    return {"step": step, "epoch": epoch, "eval/loss": 1.5 / step, "eval/top1": 2.0 * step, "eval/top5": 90, **more}


_BEFORE = [_training(1), _training(2)]
_AFTER = [*_BEFORE, _evaluation(2, 1), _training(4, 2), _evaluation(4, 2)]
_AVERAGED = [*_AFTER, _evaluation(6, 3, **{"eval/ema_loss": 0.2, "eval/ema_top1": 12.0})]


@pytest.mark.parametrize(
    ("lines", "colours"),
    [
        ([], set()),
        ([_training(7)], {_BLUE}),
        (_BEFORE, {_BLUE}),
        (_AFTER, {_BLUE, _ORANGE}),
        (_AVERAGED, {_BLUE, _ORANGE, _GREEN}),
        ([_evaluation(4, 2)], {_ORANGE}),
    ],
    ids=["nothing", "one line", "before an evaluation", "after two", "averaged weights", "an evaluation alone"],
)
def test_curves_show_what_there_is_so_far(tmp_path, lines, colours):
    path = tmp_path / "curves.png"
    draw_curves(lines, path)
    pixels = _pixels(path)
    assert {colour for colour in (_BLUE, _ORANGE, _GREEN) if _has(pixels, colour)} == colours


def test_new_curves_replace_the_old_ones_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "curves.png"
    draw_curves(_BEFORE, path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="No space left"):
            draw_curves(_AFTER, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]  # no temporary file either

    draw_curves(_AFTER, path)
    assert path.read_bytes() != before
    assert list(tmp_path.iterdir()) == [path]


def test_drawing_leaves_pyplot_alone(tmp_path):
    before = set(sys.modules)
    draw_curves(_AFTER, tmp_path / "curves.png")
    assert "matplotlib.pyplot" not in set(sys.modules) - before


def _confusion(classes, images=20):
    return np.eye(classes, dtype=np.int64) * images


def test_a_confusion_matrix_of_few_classes_has_its_counts_and_names(tmp_path):
    def drawn(confusion, names):
        draw_confusion(confusion, names, tmp_path / "confusion.png", title="x")
        return _pixels(tmp_path / "confusion.png")

    right = drawn(_confusion(3), ["a", "b", "c"])
    doubled = drawn(2 * _confusion(3), ["a", "b", "c"])  # the same shares and colours, but other counts
    assert (right != doubled).any()
    renamed = drawn(_confusion(3), ["a", "b", "d"])
    assert (right != renamed).any()


@pytest.mark.parametrize("classes", [3, 60, 1000])
def test_a_single_confusion_can_be_seen_among_many_classes(tmp_path, monkeypatch, classes):
    monkeypatch.setattr(train.pictures.figure, "_MOST_CELLS", 400)  # so that classes share cells
    monkeypatch.setattr(train.pictures.figure, "_PAIRS", 0)  # the matrix itself, not the list beside it
    names = [str(i) for i in range(classes)]
    confusion = _confusion(classes, images=50)
    confusion[-1] = 0  # a class without images
    pictures = []
    for _ in range(2):
        draw_confusion(confusion, names, tmp_path / "confusion.png", title="x")
        pictures.append(_pixels(tmp_path / "confusion.png"))
        confusion[0, 0] -= 1
        confusion[0, classes // 2] += 1
    assert all(max(picture.shape) < 2500 for picture in pictures)
    assert (np.abs(pictures[0] - pictures[1]).sum(-1) > 60).sum() >= 2


def test_names_of_any_kind_are_drawn(tmp_path):
    names = ["$", "a$b_{$", "a\nb", "\udcff", "犬", "x" * 300]
    draw_confusion(_confusion(6), names, tmp_path / "confusion.png", title="\udcff $x$")
    assert max(_pixels(tmp_path / "confusion.png").shape) < 1500


def test_the_most_frequent_confusions_are_listed_first():
    confusion = _confusion(4)
    confusion[0, 1], confusion[2, 3], confusion[3, 0] = 2, 9, 5
    listed = [(int(true), int(predicted)) for _, _, true, predicted in train.pictures.figure._most_confused(confusion)]
    assert listed == [(2, 3), (3, 0), (0, 1)]
