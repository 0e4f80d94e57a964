"""Grain's worker processes: on the processor only, one thread each, and gone when the main process is.

Ctrl-C, the end of a terminal and a job scheduler's signals reach all processes of a run at once. It is the main process
that saves and then ends the workers, so they let these signals pass.
"""

import atexit
import errno
import gc
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import popen_spawn_posix, resource_tracker, util
from typing import Any

import grain
import jax
from absl import flags
from grain.python import SharedMemoryArray

from convert.command_line import RUN_ANEW, UNGUARDED, leave_if_run_anew
from convert.errors import SettingsError, UserError, one_line
from train.data.sources import WorkersFailed
from train.devices.decoding import share_among

_GRACE_S = 30  # a worker's time after SIGTERM: enough for the main process to stop asking it for batches
_LAST_MEMORY_S = 10  # time to give back shared memory when the program ends, which takes far less
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_QUIET = "ignore:resource_tracker:UserWarning"
_SHARED_MEMORY = "/dev/shm"
_spawn = util.spawnv_passfds


def in_workers(batches: grain.IterDataset, workers: int) -> grain.IterDataset:
    """The same batches from so many processes; 0: from this one. Close its iterators: that ends the processes.

    The iterators raise WorkersFailed, and SettingsError where the workers run a script without a main guard.
    """
    if not workers:
        return batches
    leave_if_run_anew()
    popen_spawn_posix.Popen, util.spawnv_passfds = _Start, _spawn_only_reader  # type: ignore[misc]
    share_among(workers)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain's workers ask absl, which does not run this program
    return _Started(batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers), worker_init_fn=_init_worker))


class _Started(grain.IterDataset):
    """Starts all worker processes together, and at once.

    By itself Grain starts the next one, which takes seconds, when the one before has delivered: as soon as anybody has
    asked for the iterator's state, as its prefetching in a thread does.
    """

    def __iter__(self) -> grain.DatasetIterator:
        iterator = self._parent.__iter__()
        try:
            with _signals_held():  # from the process that this starts
                _start_tracker()
            with _signals_held():
                iterator.get_state()  # this makes the iterators, one for each worker, that are started next
            with _signals_held():  # anew: as it started that one, Python let two signals through
                iterator.start_prefetch()
        except (ImportError, OSError) as error:  # the former where Python finds no semaphores
            raise _failure(error) from error
        return _Explained(iterator)


class _Start(popen_spawn_posix.Popen):
    """Starts a process as Python does; one that dies before it has read what it is sent counts as started, and dead.

    Python itself keeps the reading end of the pipe open here while it writes, and so waits for ever for somebody who
    reads what is more than the pipe holds.
    """

    def _launch(self, process_obj: Any) -> None:
        with suppress(BrokenPipeError):
            super()._launch(process_obj)


def _spawn_only_reader(path: bytes, args: Sequence[str], passed: Sequence[int]) -> int:
    """The number of the new process; this one is no reader any more of the pipe that the arguments name."""
    pid = _spawn(path, args, passed)
    read_end = re.search(r"pipe_handle=(\d+)", " ".join(map(str, args)))
    if read_end:  # none: Python's own helpers
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, int(read_end[1]))  # not closed: Python does that
        os.close(null)
    return pid


class _Explained(grain.DatasetIterator):
    """The same elements; that a worker has died is told in words."""

    def __next__(self) -> Any:
        try:
            return next(self._parent)
        except (OSError, RuntimeError) as error:
            # Grain has no type of error for it
            died = re.match(r"Worker process was terminated unexpectedly with exit code (-?\d+)", str(error))
            if died:
                raise _death(int(died[1])) from None
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise _failure(error) from None
            raise

    def get_state(self) -> dict[str, Any]:
        return self._parent.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state)


def _failure(error: Exception) -> UserError:
    """The error for workers that cannot be started or send what they made."""
    if getattr(error, "errno", None) == errno.ENOSPC:
        return WorkersFailed(_no_room())
    reason = getattr(error, "strerror", None) or one_line(error)
    return WorkersFailed(f"worker processes cannot be started ({reason}); --workers 0 reads in threads")


def _death(exit_code: int) -> UserError:
    """The error for a worker that has ended so."""
    less = "fewer workers or a smaller --batch-size take less"
    if exit_code == RUN_ANEW:
        return SettingsError(UNGUARDED)
    if exit_code == -signal.SIGKILL:
        return WorkersFailed(f"a worker process was killed, as the system does where memory ends: {less}")
    if exit_code == -signal.SIGBUS:  # what comes of writing to shared memory for which there is no room
        return WorkersFailed(_no_room())
    how = f"by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"with exit status {exit_code}"
    return WorkersFailed(f"a worker process was ended {how}")


def _no_room() -> str:
    try:
        usage = shutil.disk_usage(_SHARED_MEMORY)
        size = f" ({usage.free / 2**20:.0f} of {usage.total / 2**20:.0f} MiB are free)"
    except OSError:
        size = ""
    return (
        f"{_SHARED_MEMORY}, in which worker processes leave batches, is full{size}: fewer workers or a smaller "
        "--batch-size take less, and Docker makes it larger with --shm-size=8g"
    )


def _start_tracker() -> None:
    """Starts Python's process that removes shared memory and semaphores which others leave behind.

    It would warn of them: but Ctrl-C, a killed worker and a lost host end a run at once, and then it is meant to.
    """
    sys.warnoptions.append(_QUIET)  # where Python looks for the flags of that process
    try:
        resource_tracker.ensure_running()
    finally:
        sys.warnoptions.remove(_QUIET)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Blocks signals in the threads that are started in here and in the processes that they start.

    Workers take seconds to import what they need. Until they have installed their own handlers (`_init_worker`), a
    signal would end them. Signals to the calling thread are delivered at the end of the block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@atexit.register
def give_back_memory() -> None:
    """Waits until Grain, in a thread of its own, has given back the shared memory in which batches came.

    Otherwise Python does it when the program ends, and warns of a leak.
    """
    thread = getattr(SharedMemoryArray, "_del_thread_pool", None)  # Grain has no public way to wait for it
    if thread is not None:
        gc.collect()  # this makes jax let go of batches that it used where they lay, as it does on a CPU
        thread.apply_async(int).wait(_LAST_MEMORY_S)  # what was asked of it before comes first


def _init_worker(index: int, count: int) -> None:
    for number in _SIGNALS:
        signal.signal(number, _leave_later if number == signal.SIGTERM else signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)  # see _signals_held
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = "1"  # torch's tensors are tiny here; other workers and jax need the cores
    jax.config.update("jax_platforms", "cpu")  # the accelerators belong to the main process


def _leave_later(signum: int, frame: object) -> None:
    # not ignored for good: an iterator that nobody closed is ended so by Python itself, which then waits for it
    leave = threading.Timer(_GRACE_S, os._exit, [128 + signum])
    leave.daemon = True
    leave.start()


def _leave_with_parent() -> None:
    """Without this, workers of a killed process wait for ever for room in their queue.

    Not PR_SET_PDEATHSIG: that is for the thread which started the worker, and Grain's ends early.
    """
    multiprocessing.parent_process().join()
    os._exit(1)
