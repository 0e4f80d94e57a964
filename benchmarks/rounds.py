"""Rounds in turn, the comparison that comes first, and the search for the largest batch."""

import contextlib
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.task import DETECTION_SIDES, DetectionTask, Loadable, Task
from benchmarks.worker import PATIENCE, Ready, Round, SideFailed, Worker
from convert.errors import UserError
from convert.streams import tell_error

# Largest differences of sides that agree: of logits and losses as a share of the largest one, of each gradient's norm
# as a share of itself. Those of Ti on a CPU: 2e-6, 7e-8 and 2e-5 in float32; 0.02, 2e-3 and 0.04 in bfloat16.
BOUNDS = {
    "logits": {"float32": 1e-4, "bfloat16": 0.1},
    "losses": {"float32": 1e-5, "bfloat16": 5e-3},
    "gradients": {"float32": 1e-3, "bfloat16": 0.1},
    "scores": {"float32": 1e-4},  # of detections, best first
}

# Cores that other programs may keep busy: above this ratios mean nothing, and are shown with a warning. To take turns
# does not help against that: torch's threads wait for each other at the end of every operation, so one that is denied
# its core holds up all. Seen where others had 1.4 of 2 cores: the same call took torch 0.3 s in one round and 1.8 s in
# another, and XLA between 0.1 and 0.2 s.
ACCEPTED_OTHERS = 0.05 * os.cpu_count()

_NOTHING = 1e-3  # of the median norm; key biases have no gradient, and get what is left of roundings

_LARGEST_BATCH = 4096  # no search goes further
_GPU_PATIENCE = 300.0  # see `Worker`: on a GPU all compile at once, and calls are short


def say(message: str) -> None:
    """Tells of progress, on stderr: tables are on stdout."""
    tell_error(message)


class SidesDisagree(UserError):
    """The sides do not compute the same, so their times say nothing; the message is one line."""

    status = 1


@dataclass
class Times:
    """What is known of one side."""

    ready: Ready | None = None
    rounds: list[Round] = field(default_factory=list)
    difference: float | None = None  # of logits or losses, from the reference, see `Measured`
    failure: str | None = None
    from_float32: float | None = None  # in bfloat16: of logits or losses, from the reference's in float32

    @property
    def seconds(self) -> list[float]:
        """Per call, round by round."""
        return [turn.seconds for turn in self.rounds]


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

    task: Task | DetectionTask
    reference: str  # the side that the others are compared with
    sides: dict[str, Times]


def measure(task: Task | DetectionTask, sides: Sequence[str], **how: Any) -> Measured:
    """Times the sides of a model or training step.

    Args:
        how: `rounds`, `until`, `keep` and `environment` of `take_turns`.

    Raises:
        SidesDisagree: before any round, see `require_agreement`.
    """
    reference = next((side for side in ("timm", "timm-compile", *DETECTION_SIDES) if side in sides), sides[0])
    measured = Measured(task, reference, {side: Times() for side in sides})
    take_turns(task, measured.sides, compare=lambda: require_agreement(measured), device=task.device, **how)
    return measured


def take_turns(
    task: Loadable,
    sides: Mapping[str, Times],
    *,
    compare: Callable[[], None],
    rounds: int,
    until: float | None = None,
    keep: bool = True,
    device: str = "cpu",
    environment: dict[str, str],
) -> None:
    """Times the sides in turn, A B C A B C …, never two at once.

    A side that fails is left out of the rest, and says why.

    Args:
        task: what `Worker` takes.
        sides: in the order of their turns, with nothing known yet: is filled in.
        compare: is called when all sides are ready, before any round; it may raise, or note failures in `sides`.
        until: by time.monotonic(): no round is begun that would end later, if it takes as long as the one before.
        keep: let each side's process live through all rounds; otherwise a turn starts one anew, so that only one holds
            memory on the device at a time.
        device: beside a gpu are many cores, so that all kept sides load and compile at once; they still warm up one by
            one.
        environment: for the processes.
    """
    patience = _GPU_PATIENCE if device == "gpu" else PATIENCE
    with contextlib.ExitStack() as processes:
        workers: dict[str, Worker] = {}

        def worker(side: str) -> Worker:
            if side not in workers:
                if not keep:
                    processes.close()
                    workers.clear()
                workers[side] = processes.enter_context(Worker(side, task, environment, patience=patience))
            return workers[side]

        if device == "gpu" and keep:
            for started in [worker(side) for side in sides]:
                with contextlib.suppress(SideFailed):  # noted below
                    _ = started.loaded
        for side, times in sides.items():
            with _noting_failure(times):
                times.ready = worker(side).ready
            say(f"{side}: {times.failure or _readiness(times.ready)}")
        compare()
        begun = time.monotonic()
        for number in range(1, rounds + 1):
            before, begun = begun, time.monotonic()
            if until is not None and number > 1 and begun + (begun - before) > until:
                say(f"no time for more than {number - 1} of {rounds} rounds")
                break
            for side, times in not_failed(sides).items():
                with _noting_failure(times):
                    times.rounds.append(worker(side).round())
            say(f"round {number} of {rounds} done")


def largest_common_batch(task: Task, sides: Sequence[str], environment: dict[str, str]) -> int:
    """The last of task.batch_size, twice that, … that every side can run, alone on the device.

    Compiled sides of timm are not tried, for each size would have to be compiled: timm's is that of eager.

    Raises:
        SideFailed: a side cannot run the task as it is.
    """
    largest = _LARGEST_BATCH
    for side in dict.fromkeys("timm" if side.startswith("timm") else side for side in sides):
        start = time.perf_counter()
        fits, tried = 0, task.batch_size
        while not fits or tried <= largest:
            try:
                with Worker(side, dataclasses.replace(task, batch_size=tried), environment) as worker:
                    _ = worker.loaded
            except SideFailed as failure:  # memory that is too small has many faces: a failed launch, say
                if fits:
                    break
                smaller = "; start from a smaller --batch-size" if failure.out_of_memory else ""
                raise SideFailed(f"{side} at batch {tried}: {failure}{smaller}") from None
            fits, tried = tried, 2 * tried
        largest = fits
        say(f"{side}: the largest batch is {largest} ({time.perf_counter() - start:.0f} s)")
    return largest


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
    """Fills in how far the sides are from the reference. Raises SidesDisagree if that is too far for one of them."""
    reference = measured.sides[measured.reference]
    if reference.failure:
        return
    for side, times in not_failed(measured.sides).items():
        differences = {
            what: difference(what, times.ready.check[what], expected)
            for what, expected in reference.ready.check.items()
        }
        times.difference = next(iter(differences.values()))
        for what, found in differences.items():
            bound = BOUNDS[what][measured.task.dtype]
            if not found < bound:  # not so for NaN either
                raise SidesDisagree(
                    f"{side}'s {what} differ from {measured.reference}'s by {found:.1e}; "
                    f"the bound for {measured.task.dtype} is {bound:g}: nothing is timed"
                )
        if reference.ready.float32 is not None:
            what, exact = next(iter(reference.ready.float32.items()))
            times.from_float32 = difference(what, times.ready.check[what], exact)


def difference(what: str, got: np.ndarray, expected: np.ndarray) -> float:
    """How far two sides are apart, as `BOUNDS` has it.

    Args:
        what: `logits`, `losses`, `gradients` or `scores`.
    """
    scale = np.abs(expected).max()
    if what == "gradients":
        scale = np.maximum(expected, _NOTHING * np.median(expected))
    return float((np.abs(got - expected) / scale).max())
