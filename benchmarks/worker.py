"""One side in a process of its own, which computes only when told to.

Two frameworks in one process fight for the cores. In processes of their own they do not: a worker that waits for its
next order sleeps, and so do its thread pools.
"""

import contextlib
import functools
import multiprocessing
import os
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.cpu_time import busy_seconds, own_seconds
from benchmarks.task import Program, Task

ROUND_SECONDS = 1.0  # a round takes as many calls as fill this time, at least one
_WARM_UP_SECONDS = 3.0  # by then a process has the memory that it needs


class SideFailed(RuntimeError):
    """A side cannot run the task; the message is one line.

    Attributes:
        out_of_memory: whether a smaller batch might help.
    """

    def __init__(self, message: str, *, out_of_memory: bool = False):
        super().__init__(message)
        self.out_of_memory = out_of_memory


@dataclass(frozen=True)
class Ready:
    """What a side says when it is compiled and warm."""

    check: Any  # see `Program.check`
    facts: dict[str, str]  # see `Program.facts`
    calls: int  # in a round
    load_s: float  # imports, weights
    first_s: float  # compilation, and the calls behind `check`
    warm_up_s: float  # the calls after that
    float32: Any = None  # `check` computed in float32, where the side can tell
    peak_bytes: int | None = None  # the most device memory that was in use until then; None on a CPU
    flops_per_call: int | None = None  # of the model, where the side can tell: see `Program.flops`
    peak_flops: float | None = None  # per second, of one large matrix product, where the side measures it


@dataclass(frozen=True)
class Round:
    """One turn of a side."""

    seconds: float  # per call
    others: float | None  # cores that other programs kept busy meanwhile; None where the system does not tell


class Worker:
    """The parent's handle on a side. Use it in a `with`: leaving it ends the process."""

    def __init__(self, side: str, task: Task, environment: dict[str, str]):
        context = multiprocessing.get_context("spawn")  # a fork would inherit threads and devices
        self._pipe, theirs = context.Pipe()
        # no daemon, which may not have children: an input pipeline's workers
        self._process = context.Process(target=_serve, args=(side, task, environment, theirs))
        self._process.start()
        theirs.close()  # so that the pipe ends when the process does

    @functools.cached_property
    def ready(self) -> Ready:
        """Waits until the side is loaded, compiled and warm. Raises SideFailed."""
        return self._receive()

    def round(self) -> Round:
        """Times one round; waits for `ready` first. Raises SideFailed."""
        _ = self.ready
        self._pipe.send("round")
        return self._receive()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        self._pipe.close()  # the worker leaves when its next order does not come
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _receive(self):
        try:
            answer = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            # Linux kills the largest process when memory ends
            killed = self._process.exitcode == -9
            message = f"the process died with exit code {self._process.exitcode}"
            raise SideFailed(message + " (out of memory?)" * killed, out_of_memory=killed) from None
        if isinstance(answer, SideFailed):
            raise answer
        return answer


def _serve(side: str, task: Task, environment: dict[str, str], pipe: Connection) -> None:
    os.environ.update(environment)  # before the framework is imported
    try:
        start = time.perf_counter()
        with contextlib.closing(task.load(side)) as program:
            ready = _prepare(program, time.perf_counter() - start)
            pipe.send(ready)
            while pipe.recv() == "round":
                pipe.send(_round(program, ready.calls))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        pass  # the parent has left
    except Exception as error:
        pipe.send(_failure(error))


def _prepare(program: Program, load_s: float) -> Ready:
    loaded = time.perf_counter()
    check = program.check()
    first = time.perf_counter()
    program.run(1)  # a training step compiles here
    call, end = _time(program, 1), time.perf_counter() + _WARM_UP_SECONDS
    while time.perf_counter() < end:
        call = min(call, _time(program, 1))
    warm = time.perf_counter()
    calls = max(1, round(ROUND_SECONDS / call))
    return Ready(check, program.facts, calls, load_s, first - loaded, warm - first)


def _round(program: Program, calls: int) -> Round:
    with program.around():
        busy, own = busy_seconds(), own_seconds()
        seconds = _time(program, calls)
        own = own_seconds() - own
        others = None if busy is None else max(0.0, (busy_seconds() - busy - own) / seconds)
    return Round(seconds / calls, others)


def _time(program: Program, calls: int) -> float:
    start = time.perf_counter()
    program.run(calls)
    return time.perf_counter() - start


def _failure(error: Exception) -> SideFailed:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    # torch.OutOfMemoryError, and XLA's status code
    out_of_memory = isinstance(error, MemoryError) or any(
        sign in f"{type(error).__name__} {error}" for sign in ("OutOfMemory", "RESOURCE_EXHAUSTED", "out of memory")
    )
    return SideFailed(message, out_of_memory=out_of_memory)
