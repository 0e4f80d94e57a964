"""The benchmark of detectors: a whole small run, where both sides agree, and what its table says."""

import json

import pytest

from benchmarks.detection import as_json, as_markdown, main
from benchmarks.rounds import Measured, Times
from benchmarks.task import DETECTION_SIDES, DetectionTask
from benchmarks.worker import Ready, Round
from crossvit_jax.config import VARIANTS
from tests.benchmarks.brief import BriefDetectionTask
from tests.small_model import small_config


def _content(ours: float, others: float = 0.0, failure: str | None = None) -> dict:
    def times(seconds: float) -> Times:
        return Times(Ready({}, {"torch": "1"}, 1, 1.0, 2.0, 3.0), [Round(seconds, others)] * 2, difference=1e-6)

    results = []
    for benchmark in ("inference", "training"):
        task = DetectionTask(benchmark=benchmark, variant="ti", batch_size=2, weights="none")
        sides = dict(zip(DETECTION_SIDES, (times(4.0), times(2.0), times(ours)), strict=True))
        sides["torchvision-compile"].failure = failure
        results.append(Measured(task, "torchvision", sides))
    return json.loads(json.dumps(as_json(results)))


def test_ours_is_beside_the_best_of_torchvision():
    table = as_markdown(_content(1.0))
    assert "| inference | flax | 1000.00 (1000.00-1000.00) | 2.0 | 2.00 (2.00-2.00) | 1.0e-06 |" in table
    assert table.endswith("The goal, 1.0 times torchvision's best, is reached by inference (2.000), training (2.000).")
    assert "is missed by inference (0.500), training (0.500)" in as_markdown(_content(4.0))


@pytest.mark.parametrize("told", [{"others": 1e3}, {"failure": "no compiler"}])
def test_a_busy_machine_and_a_side_that_failed_have_no_verdict(told):
    table = as_markdown(_content(1.0, **told))
    assert "The goal" not in table
    assert ("Not valid" in table) == ("others" in told)
    assert ("failed: no compiler" in table) == ("failure" in told)


@pytest.mark.parametrize("flags", ["--sides timm", "--sides flax flax", "--repeats 0", "--variant resnet"])
def test_a_wrong_flag_is_one_line_and_status_2(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(flags.split())
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_a_small_run_in_which_boxes_and_losses_agree(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(VARIANTS, "ti", small_config(0).replace(name="ti"))
    monkeypatch.setattr("benchmarks.detection.DetectionTask", BriefDetectionTask)
    path = tmp_path / "result.json"
    assert main(["--sides", "torchvision", "flax", "--repeats", "1", "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    assert [result["benchmark"] for result in written["results"]] == ["inference", "training"]
    for result in written["results"]:
        assert result["sides"]["flax"]["difference"] < 1e-4
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]) == 2 + 4
