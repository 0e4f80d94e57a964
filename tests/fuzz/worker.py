"""Processes in which damaged and hostile input is tried: each serves many, with limits of time and memory.

What takes long to import is imported before a process is forked, and no backend is started before. A process that
hangs or dies takes nothing with it but the input that it was at; the next input gets a new one.
"""

import contextlib
import io
import multiprocessing
import os
import resource
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_MIB = 2**20
_context = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Outcome:
    """What came of one input."""

    status: int | None  # the exit status; None: it hung, or its process died
    output: str  # standard output and errors together; in place of them how the process died
    memory: int = 0  # MiB that the process had at most, all that it was forked with left out

    @property
    def fault(self) -> str | None:
        """What nobody should see of a command, in words; None where it ended as it should."""
        if self.status is None:
            return self.output
        if "Traceback (most recent call last)" in self.output:
            return "a traceback: " + self.output.strip().splitlines()[-1]
        if any(not (char.isprintable() or char in "\n\t") for char in self.output):
            return "control characters in what is printed"
        return None


class Worker:
    """Calls a function with one input after the other, in a process of its own. Close it after use."""

    def __init__(self, function: Callable[[Any], int], *, seconds: float, memory: int):
        """
        Args:
            function: returns an exit status, or raises SystemExit with it.
            seconds: for one input; a process's first one, for which a backend starts, may take 4 times as long.
            memory: MiB that the process may ask for beyond what it begins with.
        """
        self._function, self._seconds, self._memory = function, seconds, memory
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Any = None
        self._served = False  # whether the process has had an input

    def __call__(self, given: Any) -> Outcome:
        if self._process is None:
            self._begin()
        self._pipe.send(given)
        seconds = self._seconds if self._served else 4 * self._seconds
        self._served = True
        if not self._pipe.poll(seconds):
            self._end()
            return Outcome(None, f"hung: no end after {seconds} s")
        try:
            return self._pipe.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            self._end()
            return Outcome(None, f"died: {signal.Signals(-code).name if code < 0 else code}")

    def close(self) -> None:
        if self._process is not None:
            self._end()

    def _begin(self) -> None:
        self._pipe, theirs = _context.Pipe()
        self._process = _context.Process(target=self._serve, args=(theirs,), daemon=True)
        self._process.start()
        self._served = False
        theirs.close()

    def _end(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()
        self._process = self._pipe = None

    def _serve(self, pipe: Any) -> None:
        self._pipe.close()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        now = _virtual_memory()
        resource.setrlimit(resource.RLIMIT_AS, (now + self._memory * _MIB,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        before = _peak()
        while True:
            given = pipe.recv()
            status, output = _called(self._function, given)
            pipe.send(Outcome(status, output, (_peak() - before) // _MIB))


def _called(function: Callable[[Any], int], given: Any) -> tuple[int, str]:
    """The status and what was printed; for what Python code printed, and nothing below it."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            status = function(given)
        except SystemExit as stopped:
            status = stopped.code if isinstance(stopped.code, int) else 1
        except BaseException:
            traceback.print_exc()
            status = 1
    return status, text.getvalue()


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _virtual_memory() -> int:
    """Bytes of address space that this process has."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
