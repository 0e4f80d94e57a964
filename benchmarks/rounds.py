"""Rounds in turn, and the comparison that comes first."""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil

from benchmarks.task import Task, cpu_seconds
from benchmarks.worker import Ready, SideFailed, Worker
from convert.errors import UserError
from convert.streams import tell_error as say  # progress is told on stderr: tables are on stdout

# Largest differences of sides that agree: of logits, losses, boxes and scores as a share of the largest one, of each
# gradient's norm as a share of itself. Those of Ti on a CPU: 2e-6, 7e-8 and 2e-5 in float32; 0.02, 2e-3 and 0.04 in
# bfloat16. Pixels are equal to the bit.
BOUNDS = {
    "logits": {"float32": 1e-4, "bfloat16": 0.1},
    "losses": {"float32": 1e-5, "bfloat16": 5e-3},
    "gradients": {"float32": 1e-3, "bfloat16": 0.1},
    "boxes": {"float32": 1e-4},
    "scores": {"float32": 1e-4},
    "images": {"float32": 0.0},
    "crops": {"float32": 0.0},
}
_NOTHING = 1e-3  # of the median norm; key biases have no gradient, and get what is left of roundings


class SidesDisagree(UserError):
    """The sides do not compute the same, so their times say nothing; the message is one line."""

    status = 1


@dataclass
class Times:
    """What is known of one side."""

    ready: Ready | None = None
    seconds: list[float] = field(default_factory=list)  # per call, round by round
    difference: float | None = None  # of the first that is compared, from the reference
    failure: str | None = None
    from_float32: float | None = None  # in bfloat16: the same, from the reference's in float32
    more: dict[str, Any] = field(default_factory=dict)  # that a result says of it

    def as_json(self) -> dict[str, Any]:
        told = {"failure": self.failure, "seconds": self.seconds} | (self.ready.told if self.ready else {})
        return told | {"difference": self.difference, "from_float32": self.from_float32} | self.more


@dataclass
class Measured:
    """A task, measured on each side."""

    task: Task
    sides: dict[str, Times]
    reference: str | None = None  # the side that the others are compared with
    others: float | None = None  # cores that other programs kept busy during the rounds


def not_failed(sides: Mapping[str, Times]) -> dict[str, Times]:
    """Those that did not fail."""
    return {side: times for side, times in sides.items() if times.failure is None}


def measure(
    task: Task,
    sides: Sequence[str],
    *,
    rounds: int,
    environment: dict[str, str],
    compare: Callable[[Measured], None] | None = None,
) -> Measured:
    """Times the sides in turn, A B C A B C …, never two at once. One that fails is left out of the rest, and says why.

    When all are ready, before any round, they are compared with eager timm, or with the first side where that is none.

    Args:
        environment: for the processes.
        compare: in place of `require_agreement`; it may raise, or note failures.
    """
    measured = Measured(task, {side: Times() for side in sides}, "timm" if "timm" in sides else sides[0])
    with contextlib.ExitStack() as processes:
        workers = {}
        for side, times in measured.sides.items():
            with _noting_failure(times):
                workers[side] = processes.enter_context(contextlib.closing(Worker(side, task, environment)))
                times.ready = workers[side].ready
                say(f"{side}: first result after {times.ready.told['first_result_s']:.1f} s")
        (compare or require_agreement)(measured)
        start, before = time.perf_counter(), _work_of_others()
        for number in range(1, rounds + 1):
            for side, times in not_failed(measured.sides).items():
                with _noting_failure(times):
                    times.seconds.append(workers[side].round())
            say(f"round {number} of {rounds} done")
        measured.others = max(0.0, (_work_of_others() - before) / (time.perf_counter() - start))
    return measured


def in_turn(turns: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each gives, round by round: A B C A B C …"""
    found: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(1, rounds + 1):
        for name, turn in turns.items():
            found[name].append(turn())
        say(f"round {number} of {rounds} done")
    return found


def _work_of_others() -> float:
    """Seconds that all cores together have worked for others than this process and those that it began.

    Other virtual machines are among them.
    """
    known = psutil.cpu_times()._asdict()
    idle = ("idle", "iowait", "guest", "guest_nice")  # guests are counted twice
    return sum(seconds for kind, seconds in known.items() if kind not in idle) - cpu_seconds(psutil.Process())


@contextlib.contextmanager
def _noting_failure(times: Times):
    try:
        yield
    except SideFailed as failure:
        times.failure = str(failure)
        say(f"failed: {failure}")


def require_agreement(measured: Measured) -> None:
    """Fills in how far the sides are from the reference. Raises SidesDisagree if that is too far for one of them."""
    reference = measured.sides[measured.reference]
    if reference.failure:
        return
    expected, exact = reference.ready.check, reference.ready.float32
    for side, times in not_failed(measured.sides).items():
        got = times.ready.check
        differences = {what: difference(what, got[what], expected[what]) for what in expected if what in got}
        times.difference = next(iter(differences.values()), None)
        for what, found in differences.items():
            bound = BOUNDS[what][measured.task.dtype]
            if not found <= bound:  # not so for NaN either
                raise SidesDisagree(
                    f"{side}'s {what} differ from {measured.reference}'s by {found:.1e}; "
                    f"the bound for {measured.task.dtype} is {bound:g}: nothing is timed"
                )
        if exact is not None and differences:
            what = next(iter(exact))
            times.from_float32 = difference(what, got[what], exact[what])


def difference(what: str, got: np.ndarray, expected: np.ndarray) -> float:
    """How far two sides are apart in one of `BOUNDS`; infinite where they have other shapes."""
    if got.shape != expected.shape:
        return float("inf")
    scale = np.abs(expected).max()
    if what == "gradients":
        scale = np.maximum(expected, _NOTHING * np.median(expected))
    return float((np.abs(got.astype(float) - expected) / scale).max())
