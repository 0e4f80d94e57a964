"""The curves of a run: there whole, with what they should show, and never in the way of the run."""

import os
import subprocess
import sys

import numpy as np
import pytest

from convert.files import NotWritten
from tests.train.pictures.pixels import pixels_of
from train.pictures.curves import _best, _epoch_means, draw_curves
from train.tasks.task import Metric

_METRICS = (Metric("top1", "top-1", "%", "max"), Metric("top5", "top-5", "%"))
_BLUE, _ORANGE, _GREEN = (0x4C, 0x72, 0xB0), (0xDD, 0x84, 0x52), (0x55, 0xA8, 0x68)


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
    draw_curves(lines, _METRICS, path)
    pixels = pixels_of(path)
    assert {colour for colour in (_BLUE, _ORANGE, _GREEN) if _has(pixels, colour)} == colours


def test_an_epochs_mean_counts_each_step_once():
    """Lines of 2 and 1 steps in the first epoch, of 3 in the second; the learning rate is told with one of them."""
    lines = [
        {"step": 2, "epoch": 1, "train/loss": 4.0, "train/lr": 1.0},
        {"step": 3, "epoch": 1, "train/loss": 1.0},
        {"step": 3, "epoch": 1, "eval/loss": 9.0},
        {"step": 6, "epoch": 2, "train/loss": 2.0},
    ]
    assert _epoch_means(lines, "train/loss") == [(3, 3.0), (6, 2.0)]


def test_the_best_evaluation_is_the_runs_best():
    lines = [
        {"step": 2 * epoch, "epoch": epoch, "eval/top1": value} for epoch, value in ((1, 10.0), (2, 30.0), (3, 20.0))
    ]
    assert _best(lines, _METRICS) == ("eval/top1", 4, 2, 30.0)
    assert _best(lines, (Metric("top1", "top-1", "%", "min"),)) == ("eval/top1", 2, 1, 10.0)
    lines[2]["eval/ema_top1"] = 30.0
    assert _best(lines, _METRICS)[:2] == ("eval/top1", 4)  # of equal ones the first
    lines[1]["eval/ema_top1"] = 30.0
    assert _best(lines, _METRICS)[:2] == ("eval/ema_top1", 4)  # and of one evaluation the average
    assert _best(lines[:1], _METRICS) is None
    assert _best(lines, (Metric("top5", "top-5"),)) is None


def test_new_curves_replace_the_old_ones_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "curves.png"
    draw_curves(_BEFORE, _METRICS, path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(NotWritten, match="no space left"):
            draw_curves(_AFTER, _METRICS, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]  # no temporary file either

    draw_curves(_AFTER, _METRICS, path)
    assert path.read_bytes() != before
    assert list(tmp_path.iterdir()) == [path]


def test_drawing_leaves_pyplot_alone(tmp_path):
    before = set(sys.modules)
    draw_curves(_AFTER, _METRICS, tmp_path / "curves.png")
    assert "matplotlib.pyplot" not in set(sys.modules) - before


def test_a_notebooks_backend_that_is_not_installed_here_does_not_matter(tmp_path):
    script = """if True:
        import os, sys
        from pathlib import Path
        from train.pictures.figure import new_figure, save_figure
        save_figure(new_figure(), Path(sys.argv[1]))
        assert os.environ["MPLBACKEND"] == "module://of_a_notebook"
    """
    environment = os.environ | {"MPLBACKEND": "module://of_a_notebook"}
    command = [sys.executable, "-c", script, str(tmp_path / "x.png")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert pixels_of(tmp_path / "x.png").size
