"""One line where another process of a run is lost, whether jax raises an error then or aborts its own process."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from convert.errors import UserError, one_line
from convert.streams import let_go_of_output, tell_error
from train.devices.held_errors import HeldErrors

# how the libraries below jax begin their errors over a connection that has ended
_LOST = ("Gloo", "UNAVAILABLE", "ABORTED", "DEADLINE_EXCEEDED", "heartbeat", "NCCL")
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_FROM_TERMINAL = 0x80  # SI_KERNEL of Linux: the terminal sends a signal to all processes of its group by itself
_PR_SET_PDEATHSIG = 1


class HostLost(UserError):
    """Another process of the run has ended; the message is one line."""

    status = 1


@contextmanager
def lost_hosts_explained() -> Iterator[None]:
    """Turns the errors of jax over a lost process, in a run of several, into HostLost."""
    import jax

    try:
        yield
    except (RuntimeError, ValueError) as error:  # jax has no type of its own for it
        text = str(error)
        too_little_memory = "RESOURCE_EXHAUSTED" in text or "out of memory" in text
        if isinstance(error, UserError) or jax.process_count() == 1 or too_little_memory:
            raise
        if not any(name in text for name in _LOST):
            raise
        raise HostLost(f"another process of the run seems to be lost: {one_line(error)[:200]}") from error


def end_at_once(message: str) -> None:
    """Tells the message and ends the process with status 1: on the usual way out jax would wait for the lost process,
    and abort."""
    tell_error(message)
    let_go_of_output()
    os._exit(HostLost.status)


def is_one_of_several(coordinator: str | None) -> bool:
    """Whether a run will have several processes, as far as that is known before jax is imported."""
    env = os.environ
    counts = (env.get(name, "1") for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"))
    known = any(count.isdecimal() and int(count) > 1 for count in counts)
    return coordinator is not None or known or "," in env.get("TPU_WORKER_HOSTNAMES", "")


def watched(work: Callable[[], int], *, told: Callable[[int], str]) -> int:
    """What `work` returns, in a process of its own that this one waits for; 1 where that was aborted.

    jax aborts its process when another one of the run is lost, and prints pages of what only its authors read: nothing
    in that process can say a word then. They come after the line that is told here. Signals are handed on, and the
    process ends with this one. To be called before jax is imported; where that has happened already, `work` is called
    as it is.

    Args:
        told: makes the line, by the number of the signal that has ended the process.
    """
    if "jax" in sys.modules or not hasattr(signal, "sigwaitinfo"):
        return work()
    heeded = (*_FORWARDED, signal.SIGCHLD)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where it is ignored, the end of the other process would not be told
    before = signal.pthread_sigmask(signal.SIG_BLOCK, heeded)  # from now on, so that none is missed
    errors = HeldErrors()
    parent, child = os.getpid(), os.fork()
    if child == 0:
        errors.begin()
        with suppress(AttributeError):  # of Linux alone
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if os.getppid() != parent:
            os._exit(HostLost.status)
        return work()
    errors.start()
    ended = _ended(child, heeded)
    errors.finish()
    number = os.WTERMSIG(ended) if os.WIFSIGNALED(ended) else 0
    if number and number not in _FORWARDED:
        tell_error(told(number))
    errors.release()
    if not number:
        os._exit(os.WEXITSTATUS(ended))  # what leaves a process in the usual way has been done in the other one
    os._exit(HostLost.status if number == signal.SIGABRT else 128 + number)


def _ended(child: int, heeded: tuple[int, ...]) -> int:
    """Hands signals on until the process has ended; how it did, as `os.waitpid` tells."""
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        got = signal.sigwaitinfo(heeded)
        if got.si_signo != signal.SIGCHLD and got.si_code != _FROM_TERMINAL:
            os.kill(child, got.si_signo)
