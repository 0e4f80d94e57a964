"""Rounds in turn: what is compared before anything is timed, and who has the next turn."""

import math

import numpy as np
import pytest

from benchmarks import rounds
from benchmarks.result import as_json
from benchmarks.rounds import Measured, SidesDisagree, Times, not_failed
from benchmarks.task import ModelTask
from benchmarks.worker import Ready, SideFailed

_SIDES = ["flax", "timm", "timm-compile"]
_TOLD = {"load_s": 0.0, "first_result_s": 0.0}


def _task(**changes) -> ModelTask:
    settings = {"benchmark": "inference", "variant": "ti", "batch_size": 4, "dtype": "float32", "device": "cpu"}
    return ModelTask(**settings | {"weights": "none"} | changes)


class _FakeWorker:
    """A side that answers at once; `script` has what each one gives as logits, or that it fails."""

    script: dict = {}  # noqa: RUF012 (set by each test)
    log: list = []  # noqa: RUF012

    def __init__(self, side, task, environment):
        self.side, self.task = side, task
        self.log.append(f"started {side}")

    def close(self):
        self.log.append(f"ended {self.side}")

    @property
    def ready(self):
        answer = self.script.get(self.side, 1.0)
        if isinstance(answer, SideFailed):
            raise answer
        self.log.append(f"warm {self.side}")
        if not isinstance(answer, dict):
            answer = {"logits": np.array([answer, 2.0])}
        exact = {name: values * 1.01 for name, values in answer.items()} if self.side == "timm" else None
        return Ready(answer, {}, _TOLD, float32=exact if self.task.dtype == "bfloat16" else None)

    def round(self):
        self.log.append(self.side)
        return 1.0


@pytest.fixture
def workers(monkeypatch):
    monkeypatch.setattr(rounds, "Worker", _FakeWorker)
    monkeypatch.setattr(_FakeWorker, "script", {})
    monkeypatch.setattr(_FakeWorker, "log", [])
    return _FakeWorker


_STEPS = {"losses": np.array([6.9, 6.5]), "gradients": np.array([0.5, 2e-2, 4e-5, 1e-11])}  # the last: a key bias


def _steps(**changes) -> dict[str, np.ndarray]:
    return _STEPS | {name: np.array(values) for name, values in changes.items()}


def _measure(**changes):
    return rounds.measure(_task(**changes), _SIDES, rounds=2, environment={})


def test_each_side_is_warm_before_the_next_one_starts_and_then_they_take_turns(workers):
    _measure()
    assert workers.log == [
        *("started flax", "warm flax", "started timm", "warm timm", "started timm-compile", "warm timm-compile"),
        *_SIDES * 2,
        *("ended timm-compile", "ended timm", "ended flax"),
    ]


@pytest.mark.parametrize(("dtype", "logit"), [("float32", 1.001), ("bfloat16", 1.3), ("float32", math.nan)])
def test_models_that_disagree_are_not_timed(workers, dtype, logit):
    workers.script = {"flax": logit}
    with pytest.raises(SidesDisagree, match=r"^flax's logits differ from timm's"):
        _measure(dtype=dtype)
    assert not set(_SIDES) & set(workers.log)


@pytest.mark.parametrize(
    ("dtype", "changes", "what"),
    [
        ("float32", {"losses": [6.9, 6.5002]}, "losses"),
        ("float32", {"losses": [6.9]}, "losses"),  # other shapes
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
    assert not set(_SIDES) & set(workers.log)


def test_training_steps_that_differ_by_rounding_are_timed(workers):
    rounded = _steps(losses=[6.9, 6.500001], gradients=[0.500001, 2e-2, 4e-5, 0])  # a key bias without any gradient
    workers.script = {"flax": rounded, "timm": _steps(), "timm-compile": _steps()}
    assert _measure(benchmark="training").sides["flax"].difference == pytest.approx(1e-6 / 6.9)
    assert workers.log.count("flax") == 2


def test_pixels_must_be_equal_and_a_side_is_compared_in_what_it_has(workers):
    pixels = np.arange(12, dtype=np.uint8)
    timm = {"images": pixels / 2, "crops": pixels}
    workers.script = {"timm": timm, "flax": {"crops": pixels}, "timm-compile": {}}
    assert _measure().sides["flax"].difference == 0
    workers.script["flax"] = {"crops": pixels + 1}
    with pytest.raises(SidesDisagree, match=r"^flax's crops differ from timm's"):
        _measure()


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", 0.01 / 1.01), ("float32", None)])
def test_the_distance_from_float32_is_told_of_all_sides_in_bfloat16(workers, dtype, expected):
    sides = _measure(dtype=dtype).sides
    assert [times.from_float32 for times in sides.values()] == [expected and pytest.approx(expected)] * 3


def test_flops_and_peak_are_one_figure_for_all_sides():
    def told(*facts) -> tuple:
        ready = [Ready({}, {}, {}, **known) for known in facts]
        sides = {str(place): Times(known, failure="x") for place, known in enumerate(ready)}
        (result,) = as_json("inference", [Measured(_task(), sides)])["results"]
        return result["flops_per_call"], result["peak_flops"]

    assert told({"flops": 6, "peak_flops": 3.0}, {"peak_flops": 4.0}, {}) == (6, 4.0)
    assert told({}) == (None, None)


def test_a_side_that_fails_says_why_and_the_others_go_on(workers):
    workers.script = {"timm-compile": SideFailed("no compiler")}
    measured = _measure()
    assert list(not_failed(measured.sides)) == ["flax", "timm"]
    assert measured.sides["timm-compile"].failure == "no compiler"
    assert [len(times.seconds) for times in measured.sides.values()] == [2, 2, 0]
