"""The benchmark of the input pipeline: what it refuses, what it compares, and a whole small run."""

import json

import numpy as np
import pytest

from benchmarks.data import as_json, as_markdown, compare, main
from benchmarks.rounds import SidesDisagree, Times
from benchmarks.task import DATA_SIDES, SIDES_ON_A_CORE, DataTask
from benchmarks.worker import Ready, Round
from tests.benchmarks.brief import BriefDataTask


def _times(*seconds, others=0.0):
    return Times(Ready({}, {"pillow": "1"}, 1, 1.0, 2.0, 3.0), [Round(s, others) for s in seconds])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--repeats 0", "--repeats"),
        ("--json /no/such/folder/x.json", "existing folder"),
        ("--sides timm", "unrecognized arguments"),
    ],
)
def test_a_wrong_flag_is_one_line_and_status_2(flags, says, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(flags.split())
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_sides_with_other_pixels_are_not_timed():
    pixels = np.arange(12.0)
    compare({"timm": {"images": pixels, "crops": pixels}, "host": {"images": pixels.copy()}, "device-augment": {}})
    with pytest.raises(SidesDisagree, match="the crops of device-worker are not those of timm"):
        compare({"timm": {"images": pixels, "crops": pixels}, "device-worker": {"crops": pixels + 1e-6}})


def test_the_ratio_is_that_of_the_printed_medians_with_the_range_of_neighbouring_rounds():
    task = DataTask(photographs=10)
    sides = {"timm": _times(1.0, 2.0), "host": _times(1.0, 2.0), "device-worker": _times(0.5, 0.5)}
    sides["device-augment"] = _times(0.1, 0.1)
    content = as_json(task, sides)
    result = content["sides"]
    assert result["timm"]["images_per_s"] == {"median": 10 / 1.5, "min": 5.0, "max": 10.0}
    assert result["device-worker"]["times_as_fast_as_timm"] == {"ratio": 3.0, "min": 2.0, "max": 4.0}
    assert result["device-augment"]["times_as_fast_as_timm"] is None
    table = as_markdown(content)
    assert "| timm | 7 (5-10) | 1.00 (1.00-1.00) |" in table
    assert "| device-worker | 20 (20-20) | 3.00 (2.00-4.00) |" in table
    assert table.endswith(
        "\n\nThe goal, 3.0 times timm on a core, is missed by host (1.000); reached by device-worker (3.000)."
    )


@pytest.mark.parametrize(("others", "valid"), [(0.0, True), (1e3, False)])
def test_a_busy_machine_is_said_aloud_and_has_no_verdict(others, valid):
    table = as_markdown(as_json(DataTask(), dict.fromkeys(DATA_SIDES, _times(1.0, others=others))))
    assert ("Not valid" in table) is not valid
    assert ("The goal" in table) is valid


@pytest.mark.slow
def test_a_small_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.data.DataTask", BriefDataTask)
    path = tmp_path / "result.json"
    assert main(["--photographs", "4", "--repeats", "1", "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    assert written["machine"]["cores"] >= 1
    assert {"jax", "torch", "timm", "pillow", "numba", "simplejpeg"} <= written["software"].keys()
    assert all(written["sides"][side]["images_per_s"]["median"] > 0 for side in DATA_SIDES)
    assert all(written["sides"][side]["times_as_fast_as_timm"]["ratio"] > 0 for side in SIDES_ON_A_CORE)
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]) == 2 + len(DATA_SIDES)
