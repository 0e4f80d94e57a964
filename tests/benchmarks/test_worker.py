"""A side in its own process: what it is asked, when it gives memory back, how it fails, whose work is counted."""

import contextlib
import time
from dataclasses import dataclass, field

import pytest

from benchmarks import worker
from benchmarks.task import Program
from benchmarks.worker import SideFailed


@dataclass(frozen=True)
class _SmallTask:
    """Whose program writes down what is done with it."""

    log: list = field(default_factory=list)
    least_calls = 3

    def loader(self, side):
        return f"{__name__}:_load_small"


def _load_small(task, side):
    task.log.append("load")

    def told(name, answer=None):
        return lambda *_: task.log.append(name) or answer

    return Program(
        check=dict,
        run=lambda times: task.log.append(f"run {times}"),
        facts={},
        before_round=told("before"),
        rest=told("rest"),
        warm_up_s=0.0,
        peak_bytes=told("peak_bytes", 5),
        flops=told("flops", 6),
        peak_flops=told("peak_flops", 7.0),
        float32=told("float32", 8),
    )


class _Pipe:
    """The worker's end: gives it the orders, and keeps its answers."""

    def __init__(self, *orders):
        self.orders, self.answers = list(orders), []

    def recv(self):
        return self.orders.pop(0)

    def send(self, answer):
        self.answers.append(answer)


def test_a_side_gives_back_memory_whenever_others_have_their_turn_and_tells_its_peak_before_it_takes_more(monkeypatch):
    monkeypatch.setattr(worker, "seconds_of", lambda run, times: run(times) or 0.4)
    task, pipe = _SmallTask(), _Pipe("round", None)
    worker._take_turns("timm", task, pipe)
    ready, turn = pipe.answers
    assert (ready.told["peak_bytes"], ready.flops, ready.peak_flops, ready.float32) == (5, 6, 7.0, 8)
    assert task.log == [
        *("load", "run 1", "run 1", "peak_bytes", "flops", "peak_flops", "float32", "rest"),
        *("before", "run 3", "rest"),  # calls of 0.4 seconds: two fill a second, but it asks for three
    ]
    assert turn == pytest.approx(0.4 / 3)


def test_a_side_that_hangs_has_failed(monkeypatch):
    monkeypatch.setattr(worker, "PATIENCE", 0.1)
    with contextlib.closing(worker.Worker("timm", _HangingTask(), {})) as hanging:
        with pytest.raises(SideFailed, match=r"^no answer within 0\.1 s$"):
            _ = hanging.ready
        hanging._process.join(5)
        assert not hanging._process.is_alive()


class _HangingTask:
    def loader(self, side):
        time.sleep(600)
