"""JSON, tables and picture of what was measured: figures follow from each other, and what does not count is said."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.plot import draw_ratios
from benchmarks.result import about, as_json, described, images_per_s, times_as_fast
from benchmarks.rounds import Measured, Times
from benchmarks.table import main, tables
from benchmarks.task import DataTask, EndToEndTask, ModelTask
from benchmarks.worker import Ready

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "docs" / "results").glob("*.json"))


def _times(*seconds: float, failure: str | None = None, peak_bytes=None, **facts) -> Times:
    ready = Ready({}, {"jax": "1", "torch threads": "2"}, {"peak_bytes": peak_bytes}, **facts)
    return Times(ready, list(seconds), 0.0, failure)


def _named(sides: dict[str, Times]) -> dict[str, Times]:
    return {name.replace("_", "-"): times for name, times in sides.items()}


def _measured(others: float = 0.0, **sides: Times) -> Measured:
    task = ModelTask(benchmark="training", variant="ti", batch_size=4, weights="none")
    return Measured(task, _named(sides), "timm", others)


def _content(*measured: Measured, benchmark: str = "training") -> dict:
    """As it is read from a file."""
    return json.loads(json.dumps(as_json(benchmark, measured)))


def _rows(*contents: dict) -> list[dict[str, str]]:
    """Of the only table, by column."""
    (table,) = tables(contents)
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]
    return [dict(zip(head, row, strict=True)) for row in rows]


RATIO = "times as fast as timm's best (min-max)"


def test_the_headline_ratio_is_that_of_the_printed_medians_with_the_range_of_the_rounds():
    flax, timm, compiled = _rows(
        _content(_measured(flax=_times(1, 4, 2), timm=_times(9, 9, 9), timm_compile=_times(3, 4, 8)))
    )
    assert flax[RATIO] == "2.00 (1.00-4.00)"
    medians = [float(row["ms per call, median (min-max)"].split()[0]) for row in (flax, compiled)]
    assert medians[1] / medians[0] == 2.0
    assert (flax["images/s"], compiled["images/s"]) == ("2.0", "1.0")
    assert timm[RATIO] == "0.44 (0.33-0.89)"
    assert compiled[RATIO] == "**best of timm**"


def test_the_ratio_of_the_medians_lies_within_the_range_of_the_rounds():
    rng = np.random.default_rng(0)
    for _ in range(50):
        ratio, least, most = times_as_fast(*rng.uniform(1, 9, size=(2, 6)).tolist())
        assert least <= ratio <= most


def test_the_median_of_a_rate_is_that_of_the_time():
    result = {"images_per_call": 10, "sides": {"timm": {"failure": None, "seconds": [1.0, 2.0]}}}
    assert images_per_s(result, "timm") == (10 / 1.5, 5.0, 10.0)


def test_a_table_has_columns_for_memory_peak_and_float32_only_where_they_are_known():
    bare = _content(_measured(flax=_times(1.0), timm=_times(2.0)))
    optional = {"peak memory, GiB", "of the matmul peak", "from float32"}
    assert not optional & _rows(bare)[0].keys()
    flax = _times(1.0, peak_bytes=3 * 2**30, flops=10, peak_flops=20.0)
    flax.from_float32 = 0.002
    told, unknown = _rows(_content(_measured(flax=flax, timm=_times(2.0))))
    assert {name: told[name] for name in optional} == {
        "peak memory, GiB": "3.00",
        "of the matmul peak": "50%",
        "from float32": "2.0e-03",
    }
    assert (unknown["peak memory, GiB"], unknown["of the matmul peak"]) == ("", "25%")


def test_a_failed_side_of_timms_is_named_and_the_rest_is_not_called_its_best():
    failed = _times(failure="OutOfMemoryError: no | memory")
    content = _content(_measured(flax=_times(1.0), timm=_times(2.0), timm_compile=failed))
    flax, timm, compiled = _rows(content)
    assert compiled["ms per call, median (min-max)"] == "failed: OutOfMemoryError: no / memory"
    assert timm[RATIO] == "**best of timm that ran**"
    assert flax[RATIO] == "2.00 (2.00-2.00)"
    (table,) = tables([content])
    assert table.endswith("\n\n**Not beside timm at its best**: a side of it failed.")


@pytest.mark.parametrize(("others", "disturbed"), [(0.0, False), (1e3, True)])
def test_a_busy_machine_is_said_aloud(others, disturbed):
    content = _content(_measured(others, flax=_times(1.0), timm=_times(2.0)))
    assert content["results"][0]["disturbed"] is disturbed
    assert ("Not valid as a comparison" in tables([content])[0]) is disturbed


def test_shares_are_of_the_sides_own_step_and_ratios_of_what_is_fed_alike():
    task = EndToEndTask(variant="ti", batch_size=4, weights="none", folder="none", files=64, workers=3)
    sides = {"flax": _times(1.0, 1.2, 1.1), "flax_device": _times(1.25, 1.5, 1.375)}
    sides |= {"flax_host": _times(failure="no | grain"), "timm": _times(2.2, 2.2, 2.2)}
    sides |= {"timm_loader": _times(5.5, 5.5, 5.5)}
    rows = _rows(_content(Measured(task, _named(sides), "timm"), benchmark="end_to_end"))
    assert {row["side"]: list(row.values())[4:] for row in rows} == {
        "flax": ["3.6 (3.3-4.0)", "", "2.00 (1.83-2.20)"],
        "flax-device": ["2.9 (2.7-3.2)", "80 % (80-80)", "4.00 (3.67-4.40)"],
        "flax-host": ["failed: no / grain", "", ""],
        "timm": ["1.8 (1.8-1.8)", "", ""],
        "timm-loader": ["0.7 (0.7-0.7)", "40 % (40-40)", ""],
    }


def test_the_devices_part_is_no_rival_of_the_workers():
    sides = {"timm": _times(1.0, 2.0), "host": _times(1.0, 2.0), "device_worker": _times(0.5, 0.5)}
    sides["device_augment"] = _times(0.1, 0.1)
    rows = _rows(_content(Measured(DataTask(batch_size=10), _named(sides), "timm"), benchmark="data"))
    assert [list(row.values()) for row in rows] == [
        ["timm", "7 (5-10)", "1.00 (1.00-1.00)"],
        ["host", "7 (5-10)", "1.00 (1.00-1.00)"],
        ["device-worker", "20 (20-20)", "3.00 (2.00-4.00)"],
        ["device-augment", "100 (100-100)", "beside the workers"],
    ]


# --- the head of a file ---


def test_a_file_tells_when_where_and_with_what_it_was_measured():
    told = about("training", {"jax": "of the side", "jax threads": "2"})
    assert {"date", "commit", "machine"} <= told.keys()
    assert {"python", "jaxlib", "flax", "torch", "timm"} <= told["software"].keys()
    assert told["software"]["jax"] == "of the side"


def test_a_gpu_is_the_one_that_a_side_names():
    told = about("training", {"torch device": "NVIDIA H200", "jax device": "NVIDIA H200"})
    assert described(told).startswith("NVIDIA H200, ")
    assert "NVIDIA" not in described(about("training", {"torch device": "cpu"}))


# --- the command ---


def _write(path: Path, content: dict) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def test_files_share_a_table_unless_machine_or_versions_differ(tmp_path, capsys):
    content = _content(_measured(flax=_times(1.0), timm=_times(2.0)))
    other = content | {"software": content["software"] | {"jax": "99"}}
    files = [_write(tmp_path / f"{number}.json", each) for number, each in enumerate((content, other, content))]
    assert main(files) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.count("jax 99") for line in lines if line.startswith("CrossViT training; ")] == [0, 1]
    assert len([line for line in lines if "| flax |" in line]) == 3


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_the_committed_results_print_the_tables_of_the_pages(file, capsys):
    assert json.loads(file.read_text())["machine"]["cpu"]
    assert main([str(file)]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) >= 4
    shown = "".join((ROOT / "docs" / page).read_text() for page in ("speed.md", "deploy.md"))
    if file.stem not in ("cpu-inference-bfloat16", "data", "startup"):  # of which the pages tell in words
        assert [row for row in rows if row not in shown and not re.match(r"\| -", row)] == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("no JSON", "not JSON"),
        ("[]", "not written by --json"),
        ('{"benchmark": "folding"}', "not written by --json"),
        ('{"benchmark": "training"}', "not as a benchmark wrote it"),
    ],
)
def test_another_file_is_one_line_and_status_2(text, says, tmp_path, capsys):
    file = tmp_path / "x.json"
    file.write_text(text)
    assert main([str(file)]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_the_picture_of_the_ratios_is_drawn(tmp_path):
    failed = _times(failure="no compiler")
    content = _content(
        _measured(flax=_times(1.0, 1.1), timm=_times(2.0, 2.5)),
        _measured(flax=_times(1.0), timm=_times(2.0), timm_compile=failed),
    )
    draw_ratios([content], tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_without_ratios_there_is_no_picture(tmp_path, capsys):
    file = _write(tmp_path / "x.json", _content(_measured(flax=_times(1.0))))
    assert main([file, "--plot", str(tmp_path / "x.png")]) == 2
    assert "no result has both Flax and timm" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


def test_the_picture_replaces_none_of_the_files_and_no_other(tmp_path, capsys):
    file = _write(tmp_path / "x.json", _content(_measured(flax=_times(1.0), timm=_times(2.0))))
    (tmp_path / "photo.png").write_bytes(b"\x89PNG")
    for place, says in ((file, "one of the files to be read"), (tmp_path / "photo.png", "was not written by this")):
        before = (tmp_path / place).read_bytes()
        assert main([file, "--plot", str(place)]) == 2
        assert says in capsys.readouterr().err
        assert (tmp_path / place).read_bytes() == before
