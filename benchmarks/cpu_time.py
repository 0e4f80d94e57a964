"""Seconds of processor time, from Linux's /proc: of the whole machine, of this process, and of its children."""

import multiprocessing
import os
import time

_FIELDS_BEFORE_UTIME = 11  # of /proc/PID/stat, after the name in brackets, which may hold anything


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
