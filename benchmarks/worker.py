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
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.task import Loadable, Program
from convert.errors import UserError

ROUND_SECONDS = 1.0  # a round takes as many calls as fill this time, at least one
PATIENCE = 900.0  # seconds: a side that takes longer for an answer hangs
_FIELDS_BEFORE_UTIME = 11  # of /proc/PID/stat, after the name in brackets, which may hold anything


class SideFailed(UserError):
    """A side cannot run the task; the message is one line.

    Attributes:
        out_of_memory: whether a smaller batch might help.
    """

    status = 1

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
    first_s: float  # compilation, and the first calls
    warm_up_s: float  # the calls after that
    peak_bytes: int | None = None  # the most device memory that was in use until then; None on a CPU
    flops_per_call: int | None = None  # of the model; where the side can tell, as the two below
    peak_flops: float | None = None  # of the device, per second
    float32: Any = None  # what `check` would be in float32


@dataclass(frozen=True)
class Round:
    """One turn of a side."""

    seconds: float  # per call
    others: float | None  # cores that other programs kept busy meanwhile; None where the system does not tell


class Worker:
    """The parent's handle on a side. Use it in a `with`: leaving it ends the process."""

    def __init__(self, side: str, task: Loadable, environment: dict[str, str], *, patience: float = PATIENCE):
        """Starts the process.

        Args:
            environment: variables that it gets besides those of this process.
            patience: seconds that it has for each answer.
        """
        self._patience = patience
        context = multiprocessing.get_context("spawn")  # a fork would inherit threads and devices
        self._pipe, theirs = context.Pipe()
        # no daemon, which may not have children: an input pipeline's workers
        self._process = context.Process(target=_serve, args=(side, task, environment, theirs))
        self._process.start()
        theirs.close()  # so that the pipe ends when the process does

    @functools.cached_property
    def loaded(self) -> Any:
        """Waits until the side is loaded and compiled. Raises SideFailed."""
        return self._receive()

    @functools.cached_property
    def ready(self) -> Ready:
        """Waits until the side is loaded, compiled and warm; nothing else should compute then. Raises SideFailed."""
        _ = self.loaded
        return self._ask("warm up")

    def round(self) -> Round:
        """Times one round; waits for `ready` first. Raises SideFailed."""
        _ = self.ready
        return self._ask("round")

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        self._pipe.close()  # the worker leaves when its next order does not come
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _ask(self, order: str) -> Any:
        with contextlib.suppress(BrokenPipeError):  # it has died, and how is found next
            self._pipe.send(order)
        return self._receive()

    def _receive(self) -> Any:
        if not self._pipe.poll(self._patience):
            self._process.kill()  # so that it keeps nothing from the others
            raise SideFailed(f"no answer within {self._patience:g} s")
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


def load_program(task: Loadable, side: str) -> Program:
    """The program of a side. Imports the side's module, and so its framework."""
    return pkgutil.resolve_name(task.loader(side))(task, side)


def _serve(side: str, task: Loadable, environment: dict[str, str], pipe: Connection) -> None:
    os.environ.update(environment)  # before the framework is imported
    try:
        _take_turns(side, task, pipe)
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        pass  # the parent has left
    except Exception as error:
        pipe.send(_failure(error))


def _take_turns(side: str, task: Loadable, pipe: Connection) -> None:
    start = time.perf_counter()
    with contextlib.closing(load_program(task, side)) as program:
        loaded = time.perf_counter()
        check = program.check()
        program.run(1)  # compiles what `check` did not need
        first = time.perf_counter()
        flops = program.flops and program.flops()
        program.rest()
        pipe.send("loaded")
        pipe.recv()
        begun, call = time.perf_counter(), _time(program, 1)
        while time.perf_counter() < begun + program.warm_up_s:
            call = min(call, _time(program, 1))
        ready = Ready(
            check,
            program.facts,
            calls=max(1, round(ROUND_SECONDS / call)),
            load_s=loaded - start,
            first_s=first - loaded,
            warm_up_s=time.perf_counter() - begun,
            peak_bytes=program.peak_bytes(),  # before what follows takes memory
            flops_per_call=flops,
            peak_flops=program.peak_flops and program.peak_flops(),
            float32=program.float32 and program.float32(),
        )
        program.rest()
        pipe.send(ready)
        while pipe.recv() == "round":
            pipe.send(_round(program, ready.calls))


def _round(program: Program, calls: int) -> Round:
    with program.around():
        busy, own = busy_seconds(), own_seconds()
        seconds = _time(program, calls)
        own = own_seconds() - own
        others = None if busy is None else max(0.0, (busy_seconds() - busy - own) / seconds)
    program.rest()
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


# --- processor time, from Linux's /proc ---


def busy_seconds() -> float | None:
    """What all cores together have worked since the start, for anyone: other virtual machines included.

    None where the system does not tell.
    """
    try:
        with open("/proc/stat") as file:
            user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = map(int, file.readline().split()[1:])
    except OSError:  # not Linux
        return None
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """What this process and its children have worked."""
    return time.process_time() + children_seconds()


def children_seconds() -> float:
    """What the living children of this process, such as workers of its input pipeline, have worked.

    0 where the system does not tell.
    """
    return sum(_seconds_of(child.pid) for child in multiprocessing.active_children())


def _seconds_of(pid: int) -> float:
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:  # not Linux, or it has ended
        return 0.0
    user, system = fields[_FIELDS_BEFORE_UTIME : _FIELDS_BEFORE_UTIME + 2]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
