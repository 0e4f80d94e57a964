"""Rounds in turn: what is compared before anything is timed, who has the next turn, how the largest batch is found."""

import math

import numpy as np
import pytest

from benchmarks import rounds
from benchmarks.result import as_json
from benchmarks.rounds import Measured, SidesDisagree, Times, not_failed
from benchmarks.table import table_lines
from benchmarks.task import SIDES, Task
from benchmarks.worker import Ready, Round, SideFailed


def _task(**changes) -> Task:
    settings = {"benchmark": "inference", "variant": "ti", "batch_size": 4, "dtype": "float32", "device": "cpu"}
    return Task(**settings | {"weights": "none"} | changes)


class _FakeWorker:
    """A side that answers at once; `script` has what each one gives as logits, or that it fails."""

    script: dict = {}  # noqa: RUF012 (set by each test)
    log: list = []  # noqa: RUF012

    def __init__(self, side, task, environment, *, patience=0.0):
        self.side, self.task = side, task
        self.log.append(f"started {side}")

    def __enter__(self):
        self.log.append(f"+{self.side}")
        return self

    def __exit__(self, *_):
        self.log.append(f"-{self.side}")

    @property
    def loaded(self):
        answer = self.script.get(self.side, 1.0)
        if isinstance(answer, SideFailed):
            raise answer
        return answer

    @property
    def ready(self):
        answer = self.loaded
        self.log.append(f"warm {self.side}")
        if not isinstance(answer, dict):
            answer = {"logits": np.array([answer, 2.0])}
        exact = {name: values * 1.01 for name, values in answer.items()} if self.side == "timm" else None
        return Ready(answer, {}, 1, 0.0, 0.0, 0.0, float32=exact if self.task.dtype == "bfloat16" else None)

    def round(self):
        self.log.append(self.side)
        return Round(1.0, 0.0)


@pytest.fixture
def workers(monkeypatch):
    monkeypatch.setattr(rounds, "Worker", _FakeWorker)
    monkeypatch.setattr(_FakeWorker, "script", {})
    monkeypatch.setattr(_FakeWorker, "log", [])
    return _FakeWorker


_STEPS = {"losses": np.array([6.9, 6.5]), "gradients": np.array([0.5, 2e-2, 4e-5, 1e-11])}  # the last: a key bias


def _steps(**changes) -> dict[str, np.ndarray]:
    return _STEPS | {name: np.array(values) for name, values in changes.items()}


def _measure(keep=True, **changes):
    sides = ["flax", "timm", "timm-compile"]
    return rounds.measure(_task(**changes), sides, rounds=2, keep=keep, environment={})


def test_the_sides_take_turns(workers):
    _measure()
    assert [entry for entry in workers.log if entry in SIDES] == ["flax", "timm", "timm-compile"] * 2


@pytest.mark.parametrize(("until", "count"), [(None, 4), (14.0, 4), (13.9, 3), (10.0, 2), (1.0, 1)])
def test_no_round_is_begun_that_would_end_too_late_but_the_first(workers, monkeypatch, capsys, until, count):
    """Each of the three sides takes a second, and the first round begins after two."""
    monkeypatch.setattr(rounds.time, "monotonic", lambda: 2.0 + sum(entry in SIDES for entry in workers.log))
    sides = {side: Times() for side in ("flax", "timm", "timm-compile")}
    rounds.take_turns(_task(), sides, compare=lambda: None, rounds=4, until=until, environment={})
    assert [len(times.rounds) for times in sides.values()] == [count] * 3
    assert ("no time for more" in capsys.readouterr().err) == (count < 4)


def test_on_a_cpu_a_side_is_warm_before_the_next_one_starts(workers):
    _measure()
    first_round = workers.log.index("flax")
    assert [entry for entry in workers.log[:first_round] if " " in entry] == [
        *("started flax", "warm flax", "started timm", "warm timm", "started timm-compile", "warm timm-compile")
    ]


def test_on_a_gpu_all_load_at_once_and_warm_up_one_by_one(workers):
    workers.script = {"flax": SideFailed("no memory")}
    measured = _measure(device="gpu")
    first_round = workers.log.index("timm")
    assert [entry for entry in workers.log[:first_round] if " " in entry] == [
        *("started flax", "started timm", "started timm-compile", "warm timm", "warm timm-compile")
    ]
    assert measured.sides["flax"].failure == "no memory"


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_at_the_largest_batch_no_two_processes_live_at_once(workers, device):
    _measure(keep=False, device=device)
    alive = 0
    for entry in workers.log:
        alive += {"+": 1, "-": -1}.get(entry[0], 0)
        assert alive <= 1
    assert alive == 0


@pytest.mark.parametrize(("dtype", "logit"), [("float32", 1.001), ("bfloat16", 1.3), ("float32", math.nan)])
def test_models_that_disagree_are_not_timed(workers, dtype, logit):
    workers.script = {"flax": logit}
    with pytest.raises(SidesDisagree, match=r"^flax's logits differ from timm's"):
        _measure(dtype=dtype)
    assert not set(SIDES) & set(workers.log)


@pytest.mark.parametrize(
    ("dtype", "changes", "what"),
    [
        ("float32", {"losses": [6.9, 6.5002]}, "losses"),
        ("bfloat16", {"losses": [6.9, 6.55]}, "losses"),
        ("float32", {"gradients": [0.5, 2e-2, 0, 0]}, "gradients"),  # the smallest one that is no rounding is missing
        ("bfloat16", {"gradients": [0.5, 2e-2, 0, 0]}, "gradients"),
        ("bfloat16", {"gradients": [0.5, 4e-2, 4e-5, 0]}, "gradients"),
        ("bfloat16", {"gradients": [math.nan, 2e-2, 4e-5, 0]}, "gradients"),
    ],
)
def test_training_steps_that_disagree_are_not_timed(workers, dtype, changes, what):
    workers.script = {"flax": _steps(**changes), "timm": _steps(), "timm-compile": _steps()}
    with pytest.raises(SidesDisagree, match=rf"^flax's {what} differ from timm's"):
        _measure(dtype=dtype, benchmark="training")
    assert not set(SIDES) & set(workers.log)


def test_training_steps_that_differ_by_rounding_are_timed(workers):
    rounded = _steps(losses=[6.9, 6.500001], gradients=[0.500001, 2e-2, 4e-5, 0])  # a key bias without any gradient
    workers.script = {"flax": rounded, "timm": _steps(), "timm-compile": _steps()}
    assert _measure(benchmark="training").sides["flax"].difference == pytest.approx(1e-6 / 6.9)
    assert workers.log.count("flax") == 2


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", 0.01 / 1.01), ("float32", None)])
def test_the_distance_from_float32_is_told_of_all_sides_in_bfloat16(workers, dtype, expected):
    sides = _measure(dtype=dtype).sides
    assert [times.from_float32 for times in sides.values()] == [expected and pytest.approx(expected)] * 3


def test_flops_and_peak_are_one_figure_for_all_sides():
    def told(*facts) -> tuple:
        ready = [Ready({}, {}, 1, 0.0, 0.0, 0.0, **known) for known in facts]
        sides = {str(place): Times(known, failure="x") for place, known in enumerate(ready)}
        (result,) = as_json("inference", [Measured(_task(), "timm", sides)])["results"]
        return result["flops_per_call"], result["peak_flops"]

    assert told({"flops_per_call": 6, "peak_flops": 3.0}, {"peak_flops": 4.0}, {}) == (6, 4.0)
    assert told({}) == (None, None)


def test_a_failed_side_is_a_row_and_the_others_go_on(workers):
    workers.script = {"timm-compile": SideFailed("no compiler")}
    measured = _measure()
    assert list(not_failed(measured.sides)) == ["flax", "timm"]
    assert "failed: no compiler" in table_lines([as_json("inference", [measured])])[-1]


def test_the_largest_common_batch_is_searched_once_per_framework_and_attention(monkeypatch):
    fitting = {"flax": 2048, "flax-cudnn": 1500, "timm": 4096}
    asked = _searched(monkeypatch, fitting)
    assert rounds.largest_common_batch(_task(batch_size=256), SIDES, {}) == 1024
    assert asked == {
        "flax": [256, 512, 1024, 2048, 4096],
        "flax-cudnn": [256, 512, 1024, 2048],
        "timm": [256, 512, 1024],
    }


@pytest.mark.parametrize(("fitting", "found"), [(64, 64), (100, 64), (8, 8), (10_000, 4096)])
def test_the_batch_is_doubled_until_anything_fails_or_enough_is_known(monkeypatch, fitting, found):
    _searched(monkeypatch, {"timm": fitting})
    assert rounds.largest_common_batch(_task(batch_size=8), ["timm"], {}) == found


def _searched(monkeypatch, fitting):
    """Sides that run out of memory beyond the batches in `fitting`; returns what is asked of each."""
    asked = {side: [] for side in fitting}

    class Fitting(_FakeWorker):
        @property
        def loaded(self):
            asked[self.side].append(self.task.batch_size)
            if self.task.batch_size > fitting[self.side]:
                raise SideFailed("an illegal memory access was encountered")

    monkeypatch.setattr(rounds, "Worker", Fitting)
    return asked


def test_a_batch_that_does_not_fit_at_all_is_told(workers):
    workers.script = {"flax": SideFailed("out of memory", out_of_memory=True)}
    with pytest.raises(SideFailed, match=r"^flax at batch 256: out of memory; start from a smaller"):
        rounds.largest_common_batch(_task(batch_size=256), ["flax"], {})
