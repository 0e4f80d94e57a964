"""One side in a process of its own, which computes only when told to.

Two frameworks in one process fight for the cores. In processes of their own they do not: a worker that waits for its
next order sleeps, and so do its thread pools.
"""

import contextlib
import functools
import multiprocessing
import os
import pkgutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.task import Program, Task
from convert.errors import UserError, one_line

ROUND_SECONDS = 1.0  # a round takes as many calls as fill this time, at least `Task.least_calls`
PATIENCE = 900.0  # seconds: a side that takes longer for an answer hangs


class SideFailed(UserError):
    """A side cannot run the task; the message is one line."""

    status = 1


@dataclass(frozen=True)
class Ready:
    """What a side says when it is compiled and warm."""

    check: dict[str, Any]  # see `Program.check`
    facts: dict[str, str]  # see `Program.facts`
    # calls in a round; seconds until it was loaded, had its first result, was warm; device memory in use at most
    told: dict[str, float | None]
    flops: int | None = None  # of the model in a call; where the side can tell, as the two below
    peak_flops: float | None = None  # of the device, per second
    float32: Any = None  # what `check` would be in float32


class Worker:
    """The parent's handle on a side. Close it after use."""

    def __init__(self, side: str, task: Task, environment: dict[str, str]):
        """Starts the process, with more environment variables."""
        context = multiprocessing.get_context("spawn")  # a fork would inherit threads and devices
        self._pipe, theirs = context.Pipe()
        # no daemon, which may not have children: an input pipeline's workers
        self._process = context.Process(target=_serve, args=(side, task, environment, theirs))
        self._process.start()
        theirs.close()  # so that the pipe ends when the process does

    @functools.cached_property
    def ready(self) -> Ready:
        """Waits until the side is loaded, compiled and warm; nothing else should compute then. Raises SideFailed."""
        return self._receive()

    def round(self) -> float:
        """Times one round of a side that is ready: seconds per call. Raises SideFailed."""
        with contextlib.suppress(BrokenPipeError):  # it has died, and how is found next
            self._pipe.send("round")
        return self._receive()

    def close(self) -> None:
        """Ends the process."""
        self._pipe.close()  # the worker leaves when its next order does not come
        self._process.join(timeout=60)  # its own workers end first
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _receive(self) -> Any:
        if not self._pipe.poll(PATIENCE):
            self._process.kill()  # so that it keeps nothing from the others
            raise SideFailed(f"no answer within {PATIENCE:g} s")
        try:
            answer = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            code = self._process.exitcode
            why = " (out of memory?)" if code == -9 else ""  # Linux kills the largest process when memory ends
            raise SideFailed(f"the process died with exit code {code}{why}") from None
        if isinstance(answer, SideFailed):
            raise answer
        return answer


def load_program(task: Task, side: str) -> Program:
    """The program of a side. Imports the side's module, and so its framework."""
    return pkgutil.resolve_name(task.loader(side))(task, side)


def _serve(side: str, task: Task, environment: dict[str, str], pipe: Connection) -> None:
    os.environ.update(environment)  # before the framework is imported
    try:
        _take_turns(side, task, pipe)
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        pass  # the parent has left
    except Exception as error:
        pipe.send(SideFailed(f"{type(error).__name__}: {one_line(error)}"))


def _take_turns(side: str, task: Task, pipe: Connection) -> None:
    start = time.perf_counter()
    with contextlib.closing(load_program(task, side)) as program:
        loaded = time.perf_counter()
        check = program.check()
        program.run(1)  # compiles what `check` did not need
        first = time.perf_counter()
        call = seconds_of(program.run, 1)
        while time.perf_counter() < first + program.warm_up_s:
            call = min(call, seconds_of(program.run, 1))
        calls = max(task.least_calls, round(ROUND_SECONDS / call))
        told = {"load_s": loaded - start, "first_result_s": first - loaded, "warm_up_s": time.perf_counter() - first}
        told |= {"calls_per_round": calls, "peak_bytes": program.peak_bytes()}  # before what follows takes memory
        measures = (program.flops, program.peak_flops, program.float32)
        ready = Ready(check, program.facts, told, *(measure and measure() for measure in measures))
        before_round = program.before_round or (lambda: task.device == "gpu" and program.run(1))
        program.rest()
        pipe.send(ready)
        while pipe.recv() == "round":
            before_round()
            seconds = seconds_of(program.run, calls)
            program.rest()
            pipe.send(seconds / calls)


def seconds_of(run: Callable[[int], None], calls: int) -> float:
    """How long so many calls take together."""
    start = time.perf_counter()
    run(calls)
    return time.perf_counter() - start
