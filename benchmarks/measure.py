"""Rounds in turn, the comparison that comes first, and the search for the largest batch."""

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.task import FLAX_SIDES, TIMM_SIDES, Task
from benchmarks.worker import Ready, Round, SideFailed, Worker

# largest difference ÷ largest value, of logits or of losses
BOUND = {"float32": 1e-4, "bfloat16": 0.1}

ACCEPTED_OTHERS = 0.1  # cores; above this the times are shown with a warning


class SidesDisagree(RuntimeError):
    """The sides do not compute the same, so their times say nothing; the message is one line."""


@dataclass
class Times:
    """What is known of one side."""

    ready: Ready | None = None
    rounds: list[Round] = field(default_factory=list)
    difference: float | None = None  # of logits or losses, from the reference, see `Measured`
    failure: str | None = None
    out_of_memory: bool = False  # why it failed
    from_float32: float | None = None  # in bfloat16: of logits or losses, from the reference's in float32

    @property
    def seconds(self) -> list[float]:
        """Per call, round by round."""
        return [turn.seconds for turn in self.rounds]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def times_as_fast(side: Times, other: Times) -> list[float]:
    """How many times as fast a side is as another, round by round: neighbours share the machine's mood."""
    return [b / a for a, b in zip(side.seconds, other.seconds, strict=True)]


@dataclass(frozen=True)
class Ratio:
    """How many times as fast one side is as another."""

    value: float  # of the medians that are printed
    low: float  # of the rounds: neighbours share the machine's mood
    high: float


def not_failed(sides: Mapping[str, Times]) -> dict[str, Times]:
    """Those that did not fail."""
    return {side: times for side, times in sides.items() if times.failure is None}


def cores_of_others(sides: Mapping[str, Times]) -> float | None:
    """Cores that other programs kept busy: the median over all rounds. None where the system does not tell."""
    rounds = [turn for times in not_failed(sides).values() for turn in times.rounds]
    known = [turn.others for turn in rounds if turn.others is not None]
    return statistics.median(known) if known else None


@dataclass(frozen=True)
class Measured:
    """A task, measured on each side."""

    task: Task
    reference: str  # the side that the others are compared with
    sides: dict[str, Times]

    @property
    def timed(self) -> dict[str, Times]:
        """The sides that did not fail."""
        return not_failed(self.sides)

    @property
    def others(self) -> float | None:
        """Cores that other programs kept busy: the median over all rounds. None where the system does not tell."""
        return cores_of_others(self.sides)

    @property
    def disturbed(self) -> bool:
        """Whether other programs took so much that the ratios mean nothing.

        Taking turns does not help against that: torch's threads wait for each other at the end of every operation, so
        one that is denied its core holds up all. Seen where others had 1.4 of 2 cores: the same call took torch 0.3 s
        in one round and 1.8 s in another, and XLA between 0.1 and 0.2 s.
        """
        return self.others is not None and self.others > ACCEPTED_OTHERS

    @property
    def best_flax(self) -> str | None:
        """The faster of Flax's sides."""
        return self._fastest(FLAX_SIDES)

    @property
    def best_timm(self) -> str | None:
        """The fastest of timm's sides."""
        return self._fastest(TIMM_SIDES)

    def _fastest(self, among: Sequence[str]) -> str | None:
        timed = [side for side in among if side in self.timed]
        return min(timed, key=lambda side: self.sides[side].median, default=None)

    def ratio(self, side: str) -> Ratio | None:
        """How many times as fast the faster of Flax's sides is as another; None if either is not timed."""
        if self.best_flax is None or side not in self.timed:
            return None
        ours, other = self.sides[self.best_flax], self.sides[side]
        rounds = times_as_fast(ours, other)
        return Ratio(other.median / ours.median, min(rounds), max(rounds))

    @property
    def flops_per_call(self) -> int | None:
        """FLOPs of the model, the same for every side: see `Program.flops`. None if no side could tell."""
        return next(iter(self._told("flops_per_call")), None)

    @property
    def peak_flops(self) -> float | None:
        """The device's, per second: of the fastest large matrix product that a side measured in the task's dtype."""
        return max(self._told("peak_flops"), default=None)

    def utilisation(self, side: str) -> float | None:
        """The share of the device's peak that the model's FLOPs per second reach on a side."""
        if side not in self.timed or self.flops_per_call is None or self.peak_flops is None:
            return None
        return self.flops_per_call / self.sides[side].median / self.peak_flops

    def _told(self, name: str) -> list[Any]:
        told = [getattr(times.ready, name) for times in self.sides.values() if times.ready]
        return [value for value in told if value is not None]


def measure(
    task: Task,
    sides: Sequence[str],
    *,
    rounds: int,
    keep: bool,
    environment: dict[str, str],
    say: Callable[[str], None],
) -> Measured:
    """Times the sides of a model or training step, see `take_turns`.

    Raises:
        SidesDisagree: before any round, the sides' logits or losses differ by more than the bound.
    """
    reference = next((side for side in ("timm", "timm-compile") if side in sides), sides[0])
    measured = Measured(task, reference, {side: Times() for side in sides})
    take_turns(
        task,
        measured.sides,
        compare=lambda: require_agreement(measured),
        rounds=rounds,
        keep=keep,
        environment=environment,
        say=say,
    )
    return measured


def take_turns(
    task: Any,
    sides: Mapping[str, Times],
    *,
    compare: Callable[[], None],
    rounds: int,
    keep: bool = True,
    environment: dict[str, str],
    say: Callable[[str], None],
) -> None:
    """Times the sides in turn, A B C A B C …, never two at once.

    A side that fails is left out of the rest, and says why.

    Args:
        task: what `Worker` takes.
        sides: in the order of their turns, with nothing known yet: is filled in.
        compare: is called when all sides are ready, before any round; it may raise, or note failures in `sides`.
        keep: let each side's process live through all rounds; otherwise a turn starts one anew, so that only one holds
            memory on the device at a time.
        environment: for the processes.
        say: is told about progress.
    """
    with contextlib.ExitStack() as processes:
        workers: dict[str, Worker] = {}

        def worker(side: str) -> Worker:
            if side not in workers:
                if not keep:
                    processes.close()
                    workers.clear()
                workers[side] = processes.enter_context(Worker(side, task, environment))
            return workers[side]

        for side, times in sides.items():
            with _noting_failure(times):
                times.ready = worker(side).ready
            say(f"{side}: {times.failure or _readiness(times.ready)}")
        compare()
        for number in range(1, rounds + 1):
            for side, times in not_failed(sides).items():
                with _noting_failure(times):
                    times.rounds.append(worker(side).round())
            say(f"round {number} of {rounds} done")


def largest_batch(start: int, fits: Callable[[int], bool]) -> int | None:
    """The last of start, 2 start, 4 start, … that fits; None if `start` does not."""
    batch_size = start
    while fits(batch_size):
        batch_size *= 2
    return batch_size // 2 if batch_size > start else None


def fits_all(task: Task, sides: Sequence[str], *, environment: dict[str, str], say: Callable[[str], None]) -> bool:
    """Whether every side can run the task alone on the device. Raises SideFailed for another reason than memory."""
    for side in sides:
        start = time.perf_counter()
        with Worker(side, task, environment) as worker:
            try:
                _ = worker.ready
            except SideFailed as failure:
                if not failure.out_of_memory:
                    raise SideFailed(f"{side}: {failure}") from None
                say(f"batch {task.batch_size}: {side} runs out of memory")
                return False
        say(f"batch {task.batch_size}: {side} fits ({time.perf_counter() - start:.0f} s)")
    return True


@contextlib.contextmanager
def _noting_failure(times: Times):
    try:
        yield
    except SideFailed as failure:
        times.failure = str(failure)


def _readiness(ready: Ready) -> str:
    return (
        f"loaded in {ready.load_s:.1f} s, first result after {ready.first_s:.1f} s, warm after {ready.warm_up_s:.1f} s"
    )


def require_agreement(measured: Measured) -> None:
    """Fills in the differences from the reference. Raises SidesDisagree."""
    reference = measured.sides[measured.reference]
    if reference.failure:
        return
    expected = reference.ready.check
    bound = BOUND[measured.task.dtype]
    what = {"inference": "logits", "training": "losses"}[measured.task.benchmark]
    for side, times in measured.timed.items():
        times.difference = float(np.abs(times.ready.check - expected).max() / np.abs(expected).max())
        if not times.difference < bound:  # not so for NaN either
            raise SidesDisagree(
                f"{side}'s {what} differ from {measured.reference}'s by {times.difference:.1e} of the largest; "
                f"the bound for {measured.task.dtype} is {bound:g}: nothing is timed"
            )
