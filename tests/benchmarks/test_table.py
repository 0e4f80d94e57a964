"""JSON, tables and picture of what was measured: figures follow from each other, and what does not count is said."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import result as json_result
from benchmarks.report.plot import draw_ratios
from benchmarks.result import about, as_json, best, counts, described, device_name, times_as_fast
from benchmarks.rounds import Measured, Times
from benchmarks.table import main, notes, table_lines
from benchmarks.task import Task
from benchmarks.worker import Ready, Round

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def _times(*seconds: float, others: float = 0.0, failure: str | None = None, **facts) -> Times:
    ready = Ready(np.ones(2), {"jax": "1", "torch threads": "2"}, 5, 1.0, 2.0, 3.0, **facts)
    return Times(ready, [Round(s, others) for s in seconds], 0.0, failure)


def _measured(task: dict | None = None, **sides: Times) -> Measured:
    settings = {"benchmark": "training", "variant": "ti", "batch_size": 4, "dtype": "float32", "device": "cpu"}
    settings |= {"weights": "none"} | (task or {})
    return Measured(Task(**settings), "timm", {name.replace("_", "-"): times for name, times in sides.items()})


def _content(*measured: Measured, benchmark: str = "training") -> dict:
    """As it is read from a file."""
    return json.loads(json.dumps(as_json(benchmark, measured)))


def _rows(*contents: dict) -> list[dict[str, str]]:
    """Of the only table, by column."""
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table_lines(contents) if line.startswith("|")
    ]
    return [dict(zip(head, row, strict=True)) for row in rows]


RATIO = "times as fast as timm's best (min-max)"


def test_the_headline_ratio_is_that_of_the_printed_medians_with_the_range_of_the_rounds():
    content = _content(
        _measured(flax=_times(1.0, 4.0, 2.0), timm=_times(9.0, 9.0, 9.0), timm_compile=_times(3.0, 4.0, 8.0))
    )
    assert content["results"][0]["best_timm"] == "timm-compile"
    assert content["results"][0]["times_as_fast_as_best_timm"]["flax"] == {"ratio": 2.0, "min": 1.0, "max": 4.0}
    flax, timm, compiled = _rows(content)
    assert flax[RATIO] == "2.00 (1.00-4.00)"
    medians = [float(row["ms per call, median (min-max)"].split()[0]) for row in (flax, compiled)]
    assert medians[1] / medians[0] == 2.0
    assert timm[RATIO] == "0.44 (0.33-0.89)"
    assert compiled[RATIO] == "**best of timm**"


def test_a_table_has_columns_for_memory_peak_and_float32_only_where_they_are_known():
    bare = _content(_measured(flax=_times(1.0), timm=_times(2.0)))
    optional = {"peak memory, GiB", "of the matmul peak", "from float32"}
    assert not optional & _rows(bare)[0].keys()
    flax = _times(1.0, peak_bytes=3 * 2**30, flops_per_call=10, peak_flops=20.0)
    flax.from_float32 = 0.002
    known, unknown = _rows(_content(_measured(flax=flax, timm=_times(2.0))))
    assert {name: known[name] for name in optional} == {
        "peak memory, GiB": "3.00",
        "of the matmul peak": "50%",
        "from float32": "2.0e-03",
    }
    assert (unknown["peak memory, GiB"], unknown["of the matmul peak"]) == ("", "25%")


def test_a_failed_side_of_timms_is_named_and_no_goal_is_said_to_be_reached_beside_the_rest():
    failed = _times(failure="OutOfMemoryError: no | memory")
    content = _content(_measured(flax=_times(1.0), timm=_times(2.0), timm_compile=failed))
    flax, timm, compiled = _rows(content)
    assert compiled["ms per call, median (min-max)"] == "failed: OutOfMemoryError: no / memory"
    assert timm[RATIO] == "**best of timm that ran**"
    assert flax[RATIO] == "2.00 (2.00-2.00)"
    (note,) = filter(None, notes([content]))
    assert note.startswith("**Not beside timm at its best**: ti at batch 4: timm-compile failed.")
    assert not counts(content["results"][0])


@pytest.mark.parametrize(
    ("seconds", "verdict"),
    [(1.0, "is reached by ti at batch 4 (2.000)."), (2.01, "is missed by ti at batch 4 (0.995).")],
)
def test_a_missed_goal_is_said_plainly_even_where_the_table_rounds_it_away(seconds, verdict):
    (note,) = filter(None, notes([_content(_measured(flax=_times(seconds), timm=_times(2.0)))]))
    assert note == f"The goal, 1.0 times timm's best, {verdict}"


def test_the_best_side_of_ours_is_beside_the_goal():
    content = _content(_measured(flax=_times(4.0), flax_cudnn=_times(1.0), timm=_times(2.0)))
    (result,) = content["results"]
    assert best(result, "flax") == "flax-cudnn"
    assert "reached by ti at batch 4 (2.000)" in notes([content])[-1]


_B_ON_A_GPU = {"variant": "b", "device": "gpu", "dtype": "bfloat16"}


def _on_a_gpu(task: dict | None = None, *, others: float = 0.0, timms_failure: str | None = None) -> Measured:
    """A step of two seconds for 1.9 of its FLOPs at a peak of 2 per second, in three quarters of timm's memory."""
    flax = _times(2.0, others=others, peak_bytes=3, flops_per_call=19, peak_flops=20.0)
    compiled = _times(3.0, others=others, peak_bytes=4, failure=timms_failure)
    eager = _times(4.0, others=others, peak_bytes=2)
    return _measured(_B_ON_A_GPU | (task or {}), flax=flax, timm=eager, timm_compile=compiled)


@pytest.mark.parametrize(
    ("benchmark", "verdicts"),
    [
        (
            "training",
            [
                "The goal, 1.25 times timm's best, is reached by b at batch 4 in bfloat16 (1.500).",
                "The goal, 45% of the matmul peak, is reached by b at batch 4 in bfloat16 (47.5%).",
                "The goal, the peak memory of timm's best at most, is reached by b at batch 4 in bfloat16 (0.750).",
            ],
        ),
        (
            "inference",
            [
                "The goal, 1.25 times timm's best, is reached by b at batch 4 in bfloat16 (1.500).",
                "The goal, 50% of the matmul peak, is missed by b at batch 4 in bfloat16 (47.5%).",
            ],
        ),
    ],
)
def test_on_a_gpu_the_share_of_the_peak_and_training_memory_have_goals_too(benchmark, verdicts):
    assert list(filter(None, notes([_content(_on_a_gpu(), benchmark=benchmark)]))) == verdicts


def test_more_memory_than_timms_fastest_side_misses_the_goal():
    sides = {
        "flax": _times(1.0, peak_bytes=4),
        "flax_cudnn": _times(2.0, peak_bytes=1),
        "timm": _times(2.0, peak_bytes=3),
    }
    assert notes([_content(_measured(_B_ON_A_GPU, **sides))])[-1].endswith(
        "is missed by b at batch 4 in bfloat16 (1.333)."
    )


@pytest.mark.parametrize(
    ("task", "goals"),
    [
        ({"variant": "s"}, ["1.25 times", "peak memory"]),
        ({"dtype": "float32"}, ["1.25 times"]),
        ({"device": "cpu"}, ["1.0 times"]),
    ],
)
def test_the_goals_of_gpus_are_for_what_they_were_set_for(task, goals):
    verdicts = list(filter(None, notes([_content(_on_a_gpu(task))])))
    assert len(verdicts) == len(goals)
    assert all(goal in verdict for goal, verdict in zip(goals, verdicts, strict=True))


def test_a_share_of_the_peak_counts_without_timm_but_not_on_a_busy_machine():
    failed, busy = (notes([_content(_on_a_gpu(**how))]) for how in ({"timms_failure": "no compiler"}, {"others": 1e3}))
    assert [line for line in failed if "The goal" in line] == [
        "The goal, 45% of the matmul peak, is reached by b at batch 4 in bfloat16 (47.5%)."
    ]
    assert not [line for line in busy if "The goal" in line]


def test_two_precisions_of_one_variant_both_have_a_verdict():
    sides = {"flax": _times(1.0), "timm": _times(2.0)}
    content = _content(_measured(**sides), _measured({"dtype": "bfloat16"}, flax=_times(4.0), timm=_times(2.0)))
    assert notes([content])[-1].endswith(
        "is missed by ti at batch 4 in bfloat16 (0.500); reached by ti at batch 4 (2.000)."
    )


@pytest.mark.parametrize(("others", "disturbed"), [(0.0, False), (1e3, True)])
def test_a_busy_machine_is_said_aloud_and_has_no_verdict(others, disturbed):
    content = _content(_measured(flax=_times(1.0, others=others), timm=_times(2.0, others=others)))
    assert content["results"][0]["disturbed"] is disturbed
    text = "\n".join(notes([content]))
    assert ("Not valid as a comparison" in text) is disturbed
    assert ("The goal" in text) is not disturbed


def test_a_result_more_adds_lines_and_changes_none():
    first = _measured(flax=_times(1.0), timm=_times(2.0))
    second = _measured(flax=_times(1.0, peak_bytes=2**30), timm=_times(2.0))
    for more in (first, second):  # with the same columns, and with other ones
        before, after = table_lines([_content(first)]), table_lines([_content(first, more)])
        assert after[: len(before)] == before and len(after) > len(before)


def test_the_ratio_of_the_medians_lies_within_the_range_of_the_rounds():
    rng = np.random.default_rng(0)
    for _ in range(50):
        sides = {name: _times(*rng.uniform(1, 9, size=6)) for name in ("flax", "timm")}
        ratio = times_as_fast(*(sides[name].seconds for name in ("flax", "timm")))
        assert ratio["min"] <= ratio["ratio"] <= ratio["max"]


# --- the head of a file ---


def test_a_file_tells_when_where_and_with_what_it_was_measured():
    told = about("training", {"jax": "of the side", "jax threads": "2"})
    assert {"date", "commit", "machine"} <= told.keys()
    assert {"python", "jaxlib", "flax", "torch", "timm"} <= told["software"].keys()
    assert told["software"]["jax"] == "of the side"


def test_a_gpus_name_memory_and_driver_and_cudas_libraries_are_told(monkeypatch):
    answer = "NVIDIA H100 80GB HBM3, 81559, 570.86.15"
    monkeypatch.setattr(json_result, "output_of", lambda program, *_: answer if program == "nvidia-smi" else None)
    told = about("training")
    assert told["machine"]["gpus"] == [
        {"name": "NVIDIA H100 80GB HBM3", "memory_bytes": 81559 * 2**20, "driver": "570.86.15"}
    ]
    assert described(told).startswith("NVIDIA H100 80GB HBM3 (80 GiB, driver 570.86.15), ")


def test_without_nvidia_smi_the_gpu_is_the_one_that_a_side_names(monkeypatch):
    monkeypatch.setattr(json_result, "output_of", lambda *_: None)
    told = about("training", {"torch device": "NVIDIA H200", "jax device": "NVIDIA H200"})
    assert described(told).startswith("NVIDIA H200, ")
    assert device_name(told, "gpu") == "NVIDIA H200"


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
    assert [line.count("jax 99") for line in lines if line.startswith("CrossViT training on ")] == [0, 1]
    assert len([line for line in lines if "| flax |" in line]) == 3


@pytest.mark.parametrize(
    "name", ["cpu-training.json", "cpu-inference-batch-32.json", "data.json", "scaling.json", "deploy-24.json"]
)
def test_the_committed_results_print_their_tables(name, capsys):
    assert main([str(RESULTS / name)]) == 0
    assert capsys.readouterr().out.count("\n| ") >= 4


def test_a_startup_file_of_one_pair_and_one_of_several_print_alike(tmp_path, capsys):
    old = about("startup") | {"flags": ["--variant", "ti"], "first_start_s": 50.0, "second_start_s": 15.0}
    new = old | {"first_start_s": [50.0, 60.0, 40.0], "second_start_s": [15.0, 15.0, 20.0]}
    main([_write(tmp_path / "old.json", old), _write(tmp_path / "new.json", new)])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| second")]
    assert rows == [
        "| second | 15.0 (15.0-15.0) | 0.30 (0.30-0.30) |",
        "| second | 15.0 (15.0-20.0) | 0.30 (0.25-0.50) |",
    ]


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
    with pytest.raises(SystemExit, match="2"):
        main([str(file)])
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_the_picture_of_the_ratios_is_drawn(tmp_path):
    failed = _times(failure="no compiler")
    content = _content(
        _measured(flax=_times(1.0, 1.1), timm=_times(2.0, 2.5)),
        _measured(flax=_times(1.0), flax_cudnn=_times(0.9), timm=_times(2.0), timm_compile=failed),
    )
    draw_ratios([content], tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_without_ratios_there_is_no_picture(tmp_path, capsys):
    file = _write(tmp_path / "x.json", _content(_measured(flax=_times(1.0))))
    with pytest.raises(SystemExit, match="2"):
        main([file, "--plot", str(tmp_path / "x.png")])
    assert "no result has both Flax and timm" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


def test_the_picture_replaces_none_of_the_files_and_no_other(tmp_path, capsys):
    file = _write(tmp_path / "x.json", _content(_measured(flax=_times(1.0), timm=_times(2.0))))
    (tmp_path / "photo.png").write_bytes(b"\x89PNG")
    for place, says in ((file, "one of the files to be read"), (tmp_path / "photo.png", "was not written by this")):
        before = (tmp_path / place).read_bytes()
        with pytest.raises(SystemExit, match="2"):
            main([file, "--plot", str(place)])
        assert says in capsys.readouterr().err
        assert (tmp_path / place).read_bytes() == before
