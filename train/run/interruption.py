"""SIGTERM and Ctrl-C: the run saves and ends; a second one ends it at once."""

import os
import signal
import sys
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils

from convert.errors import UserError

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(UserError):
    """The run was asked to end and has saved. `status` is what a shell expects: 143 for SIGTERM, 130 for Ctrl-C."""

    def __init__(self, message: str, status: int = 128 + signal.SIGTERM):
        super().__init__(message)
        self.status = status


class Interruption:
    """Listens to both signals while it is entered.

    While `can_save` is False there is nothing to be saved, and the first signal ends the process. Several processes
    stop at the same step: jax tells all of them when one gets SIGTERM, and Ctrl-C is handed on as that.
    """

    def __init__(self):
        self.can_save = False
        self._signal: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            # with several processes, SIGTERM is jax's
            for number in _SIGNALS if jax.process_count() == 1 else (signal.SIGINT,):
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
        if self._signal is not None or not self.can_save:
            where = "before it was saved" if self.can_save else "before the first step; nothing was to be saved"
            # not through sys.stderr: the signal may have come in the middle of a write to it
            os.write(sys.__stderr__.fileno(), f"\ntrain: interrupted {where}\n".encode())
            os._exit(128 + number)  # neither compilation nor worker threads can be waited for
        self._signal = number
        os.write(sys.__stderr__.fileno(), b"\ntrain: interrupted; saving, once more to end at once\n")
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)
