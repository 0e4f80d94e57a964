"""The benchmark of detectors: a whole small run, in which both sides agree."""

import json

import pytest

from benchmarks import detection
from crossvit_jax.config import VARIANTS
from tests.benchmarks.brief import BriefDetectionTask
from tests.small_model import small_config


@pytest.mark.slow
def test_a_small_run_in_which_boxes_and_losses_agree(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(VARIANTS, "ti", small_config(0).replace(name="ti"))
    monkeypatch.setattr(detection, "DetectionTask", BriefDetectionTask)
    path = tmp_path / "result.json"
    assert detection.main(["--sides", "torchvision", "flax", "--repeats", "1", "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    assert [result["benchmark"] for result in written["results"]] == ["inference", "training"]
    for result in written["results"]:
        assert result["reference"] == "torchvision"
        assert result["sides"]["flax"]["difference"] < 1e-4
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]) == 2 + 4
