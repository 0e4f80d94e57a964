"""Grain's worker processes: on the processor only, one thread each, and gone when the main process is.

Ctrl-C and a job scheduler's SIGTERM reach all processes of a run at once. It is the main process that saves and then
ends the workers, so they let these signals pass.
"""

import atexit
import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import grain
import jax
from absl import flags
from grain.python import SharedMemoryArray

_GRACE_S = 30  # a worker's time after SIGTERM: enough for the main process to stop asking it for batches
_LAST_MEMORY_S = 10  # time to give back shared memory when the program ends, which takes far less
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def in_workers(batches: grain.IterDataset, workers: int) -> grain.IterDataset:
    """The same batches from so many processes; 0: from this one. Close its iterators: that ends the processes."""
    if not workers:
        return batches
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
        iterator.get_state()  # this makes the iterators, one for each worker, that the next line starts
        with _signals_held():
            iterator.start_prefetch()
        return iterator


@contextmanager
def _signals_held() -> Iterator[None]:
    """Blocks SIGINT and SIGTERM in the threads that are started in here and in the worker processes that they start.

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
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave_later)
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
