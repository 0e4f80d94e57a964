"""The end-to-end benchmark: what it takes for photographs, how rounds begin and end, a small run."""

import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.end_to_end import write_photographs
from benchmarks.sides import fed
from benchmarks.sides.fed import check_batch
from benchmarks.task import PHOTOGRAPH_CLASSES, EndToEndTask
from train.data.datasets import open_image_sets


def _task(**changes) -> EndToEndTask:
    settings = {"variant": "ti", "batch_size": 4, "weights": "none", "folder": "none", "files": 12, "workers": 3}
    return EndToEndTask(**settings | changes)


def _photographs(task) -> tuple[np.ndarray, np.ndarray]:
    """A batch as it should be."""
    shape = (task.batch_size, *task.config().image_size, 3)
    return np.random.default_rng(0).uniform(-2.0, 2.5, shape).astype(np.float32), np.array([0, 3, 9, 3])


def test_photographs_as_the_model_wants_them_are_accepted():
    images, labels = _photographs(_task())
    images[0, :60, :60] = np.random.default_rng(1).normal(size=(60, 60, 3))  # erased
    check_batch(_task(), images, labels)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda images: images[:, :-1], "not float32 of"),
        (lambda images: images.astype(np.float64), "batches are float64"),
        (lambda images: (images + 2) / 4.5, "no photographs"),  # from 0 to 1: not normalised
        (lambda images: images * 50, "no photographs"),  # from 0 to 255
        (lambda images: images * np.nan, "no photographs"),
    ],
)
def test_a_pipeline_that_delivers_anything_else_is_told(spoil, says):
    images, labels = _photographs(_task())
    with pytest.raises(ValueError, match=says):
        check_batch(_task(), spoil(images), labels)
    with pytest.raises(ValueError, match="labels"):
        check_batch(_task(), images, labels + PHOTOGRAPH_CLASSES)


def test_a_round_begins_with_empty_queues():
    happened = []
    take, train = lambda: happened.append("take"), lambda steps: happened.append(f"train {steps}")
    program = fed.fed_program(_task(workers=2), take=take, look=None, train=train, ahead=3, facts={})
    program.before_round()
    assert happened == ["take", "take", "take", "train 2"]


def test_the_next_turn_begins_when_the_workers_rest(monkeypatch):
    worked = iter([0.0, 0.4, 0.8, 0.81, 2.0])
    monkeypatch.setattr(fed, "cpu_seconds", lambda process: next(worked))
    monkeypatch.setattr(fed.time, "sleep", lambda seconds: None)
    fed.wait_for_rest()
    assert list(worked) == [2.0]


def test_the_photographs_are_a_data_set_of_the_trainer(tmp_path):
    write_photographs(tmp_path, 12)
    sets = open_image_sets(_task(folder=str(tmp_path)).fed_recipe("device"))
    assert len(sets.train) == 12 and len(sets.class_names) == PHOTOGRAPH_CLASSES
    assert sets.train[0]["image"].startswith(b"\xff\xd8")


@pytest.mark.slow
def test_a_small_run(tmp_path):
    """Every process is a real one; nothing is left behind, neither processes nor shared memory."""
    path = tmp_path / "result.json"
    flags = "--device cpu --batch-size 2 --images 16 --workers 1 --repeats 1 --sides flax-device timm-loader"
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.small_end_to_end", *flags.split(), "--json", str(path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "leaked" not in done.stderr and "Traceback" not in done.stderr
    written = json.loads(path.read_text())
    (result,) = written["results"]
    assert (written["benchmark"], result["files"], result["workers"]) == ("end_to_end", 16, 1)
    assert min(side["calls_per_round"] for side in result["sides"].values()) >= 8
    assert list(result["sides"]) == ["flax-device", "timm-loader"]
    assert all(side["failure"] is None and len(side["seconds"]) == 1 for side in result["sides"].values())
    assert len([line for line in done.stdout.splitlines() if line.startswith("| ti |")]) == 2
