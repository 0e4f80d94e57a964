"""Signals that ask a run to end: it saves and ends; a second Ctrl-C or SIGTERM ends it at once.

Those are Ctrl-C, a scheduler's SIGTERM and its warning SIGUSR1, and SIGHUP, which says that the terminal is closed.
"""

import contextlib
import os
import signal
import threading
import time
from types import FrameType

import jax
from jax.experimental import multihost_utils

from convert.command_line import Program
from convert.errors import UserError

_PROGRAM = Program("train.main")
_IMPATIENT = (signal.SIGTERM, signal.SIGINT)
# These may come twice by themselves, from the shell as well as from the terminal, or before a SIGTERM: a second one is
# no wish to end without saving.
_WARNINGS = (signal.SIGHUP, signal.SIGUSR1)
# Sent to a whole group of processes, Ctrl-C reaches one of several processes from its parent as well, see
# `train.devices.lost_hosts`: one that follows at once is the same one.
_TWICE_S = 0.2
_STDERR = 2


class Interrupted(UserError):
    """The run was asked to end and has saved. `status` is what a shell expects: 128 and the signal's number."""

    def __init__(self, message: str, status: int = 128 + signal.SIGTERM):
        super().__init__(message)
        self.status = status


class Interruption:
    """Listens to the signals while it is entered; not to SIGHUP where that is ignored, as under nohup.

    While `can_save` is False there is nothing to be saved, and the first signal ends the process. Several processes
    stop at the same step: jax tells all of them when one gets SIGTERM, and the others are handed on as that.
    """

    def __init__(self):
        self.can_save = False
        self._signal: int | None = None
        self._since = 0.0  # by time.monotonic()
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            heeded = [number for number in _WARNINGS if signal.getsignal(number) != signal.SIG_IGN]
            # with several processes, SIGTERM is jax's
            heeded += _IMPATIENT if jax.process_count() == 1 else (signal.SIGINT,)
            for number in heeded:
                self._before[number] = signal.signal(number, self._heed)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def status(self) -> int:
        """The exit status that the signal asks for."""
        return 128 + (self._signal or signal.SIGTERM)

    def wanted(self, step: int) -> bool:
        """Whether the run shall end now, before its next step. To be asked with every step, in all processes."""
        if jax.process_count() == 1:
            return self._signal is not None
        return multihost_utils.reached_preemption_sync_point(step)

    def _heed(self, number: int, _: FrameType | None) -> None:
        if not self.can_save:
            _tell("interrupted before the first step; nothing was to be saved")
            os._exit(128 + number)  # neither compilation nor worker threads can be waited for
        at_once = time.monotonic() - self._since < _TWICE_S
        if number == self._signal == signal.SIGINT and at_once and jax.process_count() > 1:
            return
        if number in _IMPATIENT and self._signal in _IMPATIENT:
            _tell("interrupted before it was saved")
            os._exit(128 + number)
        is_first = self._signal is None
        if self._signal not in _IMPATIENT:
            self._signal, self._since = number, time.monotonic()
        if is_first:
            _tell("interrupted; saving" + ", once more to end at once" * (number in _IMPATIENT))
            if jax.process_count() > 1:
                os.kill(os.getpid(), signal.SIGTERM)


def _tell(line: str) -> None:
    """Not through sys.stderr: the signal may have come in the middle of a write to it."""
    with contextlib.suppress(OSError):  # the terminal is closed
        os.write(_STDERR, f"\n{_PROGRAM}: {line}\n".encode())
