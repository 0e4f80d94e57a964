"""The benchmark commands: what they refuse, how they search and compare, and a whole small run."""

import json
import math

import numpy as np
import pytest

from benchmarks import measure
from benchmarks.command import main
from benchmarks.measure import SidesDisagree, largest_batch
from benchmarks.model_table import multiply_adds, parameters
from benchmarks.record import as_json
from benchmarks.report import table_lines
from benchmarks.task import Task
from benchmarks.worker import Ready, Round, SideFailed
from crossvit_jax.config import get_config


def _task(**changes) -> Task:
    settings = {"benchmark": "inference", "variant": "ti", "batch_size": 4, "dtype": "float32", "device": "cpu"}
    return Task(**settings | {"weights": "none"} | changes)


class _FakeWorker:
    """A side that answers at once; `script` says what each one gives as logits, or that it fails."""

    script: dict = {}  # noqa: RUF012 (set by each test)
    log: list = []  # noqa: RUF012

    def __init__(self, side, task, environment):
        self.side = side

    def __enter__(self):
        self.log.append(f"+{self.side}")
        return self

    def __exit__(self, *_):
        self.log.append(f"-{self.side}")

    @property
    def ready(self):
        answer = self.script.get(self.side, 1.0)
        if isinstance(answer, SideFailed):
            raise answer
        return Ready(np.array([answer, 2.0]), {}, 1, 0.0, 0.0, 0.0)

    def round(self):
        self.log.append(self.side)
        return Round(1.0, 0.0)


@pytest.fixture
def workers(monkeypatch):
    monkeypatch.setattr(measure, "Worker", _FakeWorker)
    monkeypatch.setattr(_FakeWorker, "script", {})
    monkeypatch.setattr(_FakeWorker, "log", [])
    return _FakeWorker


def _measure(keep=True, **changes):
    sides = ["flax", "timm", "timm-compile"]
    return measure.measure(_task(**changes), sides, rounds=2, keep=keep, environment={}, say=lambda _: None)


@pytest.mark.parametrize(
    ("benchmark", "flags", "says"),
    [
        ("inference", "--batch-size 0", "--batch-size"),
        ("inference", "--variant resnet", "unknown CrossViT variant"),
        ("inference", "--find-largest-batch --device cpu", "--find-largest-batch needs a GPU"),
        ("inference", "--sides flax flax --device cpu", "twice"),
        ("inference", "--json /no/such/folder/x.json --device cpu", "existing folder"),
        ("inference", "--repeat 3", "unrecognized arguments"),
    ],
)
def test_a_wrong_flag_is_one_line_and_status_2(benchmark, flags, says, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(benchmark, flags.split())
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_the_sides_take_turns(workers):
    _measure()
    assert [entry for entry in workers.log if entry[0] not in "+-"] == ["flax", "timm", "timm-compile"] * 2


def test_at_the_largest_batch_no_two_processes_live_at_once(workers):
    _measure(keep=False)
    alive = 0
    for entry in workers.log:
        alive += {"+": 1, "-": -1}.get(entry[0], 0)
        assert alive <= 1
    assert alive == 0


@pytest.mark.parametrize(("dtype", "logit"), [("float32", 1.001), ("bfloat16", 1.3), ("float32", math.nan)])
def test_sides_that_disagree_are_not_timed(workers, dtype, logit):
    workers.script = {"flax": logit}
    with pytest.raises(SidesDisagree, match=r"^flax's logits differ from timm's"):
        _measure(dtype=dtype)
    assert not {"flax", "timm"} & set(workers.log)


def test_a_failed_side_is_a_row_and_the_others_go_on(workers):
    workers.script = {"timm-compile": SideFailed("no compiler")}
    measured = _measure()
    assert list(measured.timed) == ["flax", "timm"]
    assert "failed: no compiler" in table_lines([as_json("inference", [measured])])[-1]


def test_the_search_for_the_largest_batch():
    assert largest_batch(8, lambda batch_size: batch_size <= 100) == 64
    assert largest_batch(8, lambda batch_size: batch_size <= 8) == 8
    assert largest_batch(8, lambda batch_size: False) is None


def test_the_model_table_counts_what_the_paper_counts():
    assert parameters(get_config("ti")) == 7_014_800
    assert multiply_adds(get_config("ti")) / 1e9 == pytest.approx(1.6, abs=0.05)
    assert multiply_adds(get_config("15-dagger-408")) / 1e9 == pytest.approx(21.4, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("benchmark", "batch_size"), [("inference", 2), ("training", 2), pytest.param("training", 1, id="training-unmixed")]
)
def test_a_small_run(benchmark, batch_size, tmp_path, capsys):
    path = tmp_path / "result.json"
    flags = f"--variant ti --batch-size {batch_size} --repeats 1 --device cpu --sides flax timm --json"
    assert main(benchmark, [*flags.split(), str(path)]) == 0
    written = json.loads(path.read_text())
    (result,) = written["results"]
    assert written["benchmark"] == benchmark and written["machine"]["cores"] >= 1
    assert {"jax", "torch", "timm"} <= written["software"].keys()
    assert (result["variant"], result["batch_size"], result["dtype"]) == ("ti", batch_size, "float32")
    for side in ("flax", "timm"):
        times = result["sides"][side]
        assert times["failure"] is None and times["difference"] < 1e-4
        assert len(times["rounds_s_per_call"]) == 1
        assert times["images_per_s"] == pytest.approx(batch_size / times["median_s_per_call"])
    assert result["times_as_fast_as_best_timm"]["flax"]["ratio"] > 0
    rows = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith(f"| ti | {batch_size} | float32 |")
    ]
    assert len(rows) == 2
