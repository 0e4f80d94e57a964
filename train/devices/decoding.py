"""How much memory pictures take while they are decoded and resized: a bound for all threads and workers of a command.

Each process has an even share of a quarter of the machine's memory. A picture that does not fit into what is left of
it waits. One that is larger than the share is decoded while no other picture that counts is in its process, and no
other one of this kind in any process of the command. Pictures of few pixels are neither counted nor delayed.
"""

import fcntl
import os
import tempfile
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import BinaryIO

from train.devices.host_memory import host_memory

SMALL = 2**22  # pixels that are not counted: a few dozen MiB in each thread
_KEPT = 4  # pictures of a worker: being decoded, two that wait, one in use
_OF_MEMORY = 4  # pictures take 1 / 4 of it
# in the environment, for worker processes: the share of each in bytes, and the file that a picture above it locks
_SHARE, _LOCK = "CROSSVIT_DECODING_BYTES", "CROSSVIT_DECODING_LOCK"


class DecodingMemory:
    """Bytes for decoding, asked for by threads: those who ask first are first.

    Args:
        limit: what threads may hold together; a single one may hold more, alone.
        lock_path: of a file that is locked while one holds more; None: no other process decodes.
    """

    def __init__(self, limit: int, lock_path: str | None = None):
        self.limit, self.held = limit, 0
        self._lock_path = lock_path
        self._changed, self._waiting = threading.Condition(), deque()
        self._own = threading.local()

    @contextmanager
    def returned(self) -> Iterator[None]:
        """What this thread takes in the block is returned at its end; inside another block, at the end of that one."""
        if getattr(self._own, "size", None) is not None:
            yield
            return
        self._own.size, self._own.lock = 0, None
        try:
            yield
        finally:
            self._give_back()
            self._own.size = None

    def take(self, pixels: int, bytes_per_pixel: int) -> None:
        """Waits until a picture may be decoded. Call it inside `returned`.

        What was taken before in the block counts: it is for the mask of the same picture. A thread that needs more
        than that returns it first, so that no two threads wait for each other.
        """
        size = pixels * bytes_per_pixel
        if pixels <= SMALL or size <= self._own.size:
            return
        self._give_back()
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            try:
                self._changed.wait_for(lambda: self._waiting[0] is ticket and self._fits(size))
                self.held += size
                self._own.size = size
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()  # the next one may fit too
        if size > self.limit and self._lock_path is not None:
            with suppress(OSError):  # the file is gone: the main process has ended
                self._own.lock = os.open(self._lock_path, os.O_RDONLY | os.O_CLOEXEC)
                fcntl.flock(self._own.lock, fcntl.LOCK_EX)

    def _fits(self, size: int) -> bool:
        return not self.held or self.held + size <= self.limit

    def _give_back(self) -> None:
        if self._own.lock is not None:
            os.close(self._own.lock)  # which unlocks it
            self._own.lock = None
        if self._own.size:
            with self._changed:
                self.held -= self._own.size
                self._own.size = 0
                self._changed.notify_all()


@cache
def decoding_memory() -> DecodingMemory:
    """That of this process."""
    share = os.environ.get(_SHARE)
    return DecodingMemory(int(share) if share else host_memory() // _OF_MEMORY, os.environ.get(_LOCK))


def share_among(workers: int) -> None:
    """Tells worker processes that are started from now on their share."""
    os.environ[_SHARE] = str(host_memory() // _OF_MEMORY // workers)
    with suppress(OSError):  # nowhere to write: the shares alone are the bound, as on systems other than Linux
        os.environ[_LOCK] = f"/proc/{os.getpid()}/fd/{_lock_file().fileno()}"


def largest_kept(workers: int) -> int:
    """Bytes of a decoded picture that may wait for the main process, where so many workers read ahead."""
    return host_memory() // _OF_MEMORY // (max(1, workers) * _KEPT)


@cache
def _lock_file() -> BinaryIO:
    return tempfile.TemporaryFile()  # it has no name, so that nothing is left behind
