"""The benchmark of the input pipeline: a whole small run."""

import json

import pytest

from benchmarks import data
from benchmarks.task import DataTask


@pytest.mark.slow
def test_a_small_run_in_which_pixels_are_equal(here, tmp_path, capsys):
    path = tmp_path / "result.json"
    assert data.main(["--photographs", "4", "--repeats", "1", "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    assert {"jax", "torch", "timm", "pillow", "numba", "simplejpeg"} <= written["software"].keys()
    (result,) = written["results"]
    told = {name: side["difference"] for name, side in result["sides"].items()}
    assert told == {"timm": 0, "host": 0, "device-worker": 0, "device-augment": None}
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]) == 2 + len(
        DataTask.SIDES
    )
