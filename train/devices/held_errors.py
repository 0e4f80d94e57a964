"""What the libraries of a process print on standard error, passed on; what they print of a lost process comes later."""

import contextlib
import os
import re
import select
import sys
import threading
import time

# how the libraries below jax begin to tell, for their authors, that another process of the run is lost
_PAGE = re.compile(rb"^[EFW]\d{4} \d\d:\d\d:\d\d.*(coordination[_ ]service|JAX distributed service)", re.MULTILINE)
_HELD_S = 10  # no longer than that: the process goes on, and what it prints is wanted


class HeldErrors(threading.Thread):
    """A pipe from another process's standard error to that of this one.

    Where jax begins a page on a lost process there, that and all that follows is held until `release`, so that a line
    of ours can be told before. Call `begin` in the other process, and `start` in this one.
    """

    def __init__(self):
        super().__init__(daemon=True)
        self._source, self._into = os.pipe()
        self._end, self._ending = os.pipe()
        self._held, self._since = bytearray(), 0.0

    def begin(self) -> None:
        """From now on this process's standard error goes into the pipe; what Python prints does not."""
        if getattr(sys.stderr, "buffer", None) is not None and sys.stderr.fileno() == 2:
            sys.stderr.flush()
            sys.stderr = open(  # noqa: SIM115 (for the rest of the process)
                os.dup(2), "w", buffering=1, encoding=sys.stderr.encoding, errors=sys.stderr.errors
            )
        os.dup2(self._into, 2)
        for number in (self._source, self._into, self._end, self._ending):
            os.close(number)

    def run(self) -> None:
        os.close(self._into)
        while True:
            left = max(0.0, self._since + _HELD_S - time.monotonic()) if self._held else None
            ready, _, _ = select.select([self._source, self._end], [], [], left)
            if not ready:
                self.release()
            elif self._source not in ready:
                return
            else:
                data = os.read(self._source, 65536)
                if not data:
                    return
                self._take(data)

    def finish(self) -> None:
        """Reads what the other process, which has ended, has left in the pipe."""
        os.write(self._ending, b"\0")
        self.join(_HELD_S)  # processes that it has left behind may print without end

    def release(self) -> None:
        """Passes on what is held."""
        held, self._held = self._held, bytearray()
        _write(held)

    def _take(self, data: bytes) -> None:
        page = None if self._held else _PAGE.search(data)
        if page is not None:
            self._since = time.monotonic()
        if self._held or page is not None:
            start = 0 if page is None else page.start()
            _write(data[:start])
            self._held += data[start:]
        else:
            _write(data)


def _write(data: bytes | bytearray) -> None:
    with contextlib.suppress(OSError):  # nobody reads it any more
        while data:
            data = data[os.write(2, data) :]
