"""The benchmark of detectors: a whole small run, where both sides agree, and what of boxes is compared."""

import json

import numpy as np
import pytest

from benchmarks.detection import main
from benchmarks.rounds import BOUNDS, difference
from benchmarks.task import DetectionTask
from crossvit_jax.config import VARIANTS
from tests.small_model import small_config, small_detector

_TASK = DetectionTask(benchmark="inference", variant="ti", batch_size=1, weights="none")


@pytest.mark.slow
def test_boxes_and_losses_agree_in_a_small_run_and_ours_is_beside_the_best_of_torchvision(
    here, tmp_path, capsys, monkeypatch
):
    counts, found = [], DetectionTask.found

    def counted(task, images):
        counts.extend(len(image["scores"]) for image in images)
        return found(task, images)

    monkeypatch.setattr(DetectionTask, "found", counted)
    monkeypatch.setitem(VARIANTS, "ti", small_config(0).replace(name="ti"))
    monkeypatch.setattr(DetectionTask, "config", lambda task: small_detector(strides=(12, 24)))
    monkeypatch.setattr("benchmarks.task._OFTEN", -3.0)
    path = tmp_path / "result.json"
    assert main(["--sides", "torchvision", "flax", "--repeats", "1", "--json", str(path)]) == 0
    assert len(counts) == 4 and min(counts) > 10
    results = json.loads(path.read_text())["results"]
    assert [result["benchmark"] for result in results] == ["inference", "training"]
    assert all(result["sides"]["flax"]["difference"] < 1e-5 for result in results)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    ratio = rows[0].index("times as fast as torchvision's best (min-max)")
    assert [row[ratio] for row in rows[2:]] == ["**best of torchvision**", "2.00 (2.00-2.00)"] * 2


def test_boxes_labels_and_scores_are_compared_in_no_order():
    rng = np.random.default_rng(0)
    image = {"boxes": 240 * rng.random((5, 4)), "labels": rng.integers(80, size=5), "scores": rng.random(5)}
    expected = _TASK.found([image])
    turned = _TASK.found([{name: array[::-1] for name, array in image.items()}])
    fewer = _TASK.found([{name: array[1:] for name, array in image.items()}])
    other = _TASK.found([image | {"labels": image["labels"] + (np.arange(5) == 2)}])
    for what, bound in (("boxes", BOUNDS["boxes"]["float32"]), ("scores", BOUNDS["scores"]["float32"])):
        assert difference(what, turned[what], expected[what]) == 0
        assert difference(what, fewer[what], expected[what]) > bound
    assert difference("boxes", other["boxes"], expected["boxes"]) > BOUNDS["boxes"]["float32"]


@pytest.mark.parametrize("flags", ["--sides timm", "--repeats 0", "--variants resnet"])
def test_a_wrong_flag_is_one_line_and_status_2(flags, capsys):
    try:
        assert main(flags.split()) == 2
    except SystemExit as stopped:
        assert stopped.code == 2
    assert capsys.readouterr().err.count("\n") == 1
