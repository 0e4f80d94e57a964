"""Freed memory is kept by the process, so that a step on CPUs does not ask the system for fresh pages every time."""

import ctypes
import os
import platform
from importlib.metadata import entry_points
from importlib.util import find_spec

# <malloc.h> of glibc
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_LARGEST_HEAP = 64 * 2**20  # bytes, of a thread


def keep_freed_memory() -> bool:
    """Let glibc's malloc keep what is freed, where jax will compute on CPUs. Call it before jax finds its devices.

    XLA asks for the whole temporary memory of a program at every call, as one block: half a gigabyte for a training
    step of Ti at batch 8. By default malloc takes a block this large from the system and gives it back afterwards, and
    each of its 4 KB pages is cleared again when it is first touched: a fifth of the step's CPU time
    (benchmarks/NOTES.md).

    The heaps of other threads are asked for whole, too, and not page by page, in which a tenth of the time went by that
    it takes to load a compiled program.

    Only the main thread's heap can hold so large a block, so that programs have to be started there, not in threads of
    jax's own: calls return when the result is there. The same from outside: JAX_CPU_ENABLE_ASYNC_DISPATCH=false
    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=9999999999 MALLOC_TOP_PAD_=67108864. A setting of malloc by its variables
    is left alone.

    Returns:
        Whether anything was changed: not for accelerators, whose memory is not malloc's, nor without glibc.
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or not _only_cpus() or platform.libc_ver()[0] != "glibc":
        return False
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, _LARGEST_HEAP))
    return all(mallopt(*setting) == 1 for setting in settings)


def _only_cpus() -> bool:
    """Whether jax can have no other devices: what it was told, or else what is installed."""
    if "JAX_PLATFORMS" in os.environ:
        return os.environ["JAX_PLATFORMS"] == "cpu"
    return not entry_points(group="jax_plugins") and find_spec("libtpu") is None
