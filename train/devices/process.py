"""What a process keeps: memory that it freed, for the next step on CPUs, and compiled programs, for the next start."""

import contextlib
import ctypes
import glob
import os
import platform
import re
import resource
import warnings
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# <malloc.h> of glibc
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_LARGEST_HEAP = 64 * 2**20  # bytes, of a thread
_MADV_HUGEPAGE, _HUGE_PAGE = 14, 2 * 2**20  # <sys/mman.h> of Linux
_DAMAGED_PROGRAM = re.compile("Error (reading|writing) persistent compilation cache entry for '([^']*)'")
_OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")


def keep_freed_memory() -> bool:
    """Let glibc's malloc keep what is freed, where jax will compute on CPUs. Call it before jax finds its devices.

    XLA allocates the temporary memory of a program as one block at every call: half a gigabyte for a training step of
    Ti at batch 8. By default malloc returns so large a block to the system, which clears every page again at the next
    call: a fifth of the step's CPU time (docs/speed-log.md). Against this:

    - malloc keeps what is freed, and heaps grow in steps of 64 MB, which also saves a tenth of the time to load a
      compiled program. Only the main thread's heap can hold so large a block, so asynchronous dispatch is turned off:
      programs run in the thread that calls them.
    - Half of the machine's memory is reserved for pages of 2 MB in that heap, which saves 1 to 3 % of a step. This is
      left out where the process's memory is limited, because the limit counts reserved memory too.

    The same from outside: JAX_CPU_ENABLE_ASYNC_DISPATCH=false MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=9999999999
    MALLOC_TOP_PAD_=67108864 GLIBC_TUNABLES=glibc.malloc.hugetlb=1. Where the user has set one of malloc's variables,
    nothing is changed.

    Returns:
        Whether anything was changed: not for accelerators, whose memory is not malloc's, nor without glibc.
    """
    if _malloc_is_set() or not _only_cpus() or platform.libc_ver()[0] != "glibc":
        return False
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)
    libc = ctypes.CDLL(None)
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, _LARGEST_HEAP))
    changed = all(libc.mallopt(*setting) == 1 for setting in settings)
    if changed and not _memory_is_limited():
        _ask_for_huge_pages(libc)
    return changed


def keep_compiled_programs() -> None:
    """Let jax keep what takes it over a second to compile, in `crossvit/jax` of the user's cache folder.

    JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false turns it off. A program is found
    again only for the same jax, devices, shapes and compiler flags. Where the folder cannot be written, jax warns and
    goes on. A user without a home folder, as in many containers, has no such folder, and nothing is kept.
    """
    import jax

    drop_damaged_programs()
    if jax.config.jax_compilation_cache_dir is None:
        caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        if os.path.isabs(caches):  # what has no home folder stays as it is
            jax.config.update("jax_compilation_cache_dir", str(Path(caches, "crossvit", "jax")))
    _drop_what_is_no_file()


def _drop_what_is_no_file() -> None:
    """Named pipes and devices among the kept programs are removed: jax would wait for them, or read without end.

    Where they cannot be, nothing is kept, and nothing read.
    """
    import jax

    folder = jax.config.jax_compilation_cache_dir
    with contextlib.suppress(OSError), os.scandir(folder or "") as entries:
        for entry in entries:
            if entry.name.endswith(("-cache", "-atime")) and not (entry.is_file() or entry.is_dir()):
                try:
                    os.unlink(entry)
                except OSError:
                    jax.config.update("jax_enable_compilation_cache", False)


def drop_damaged_programs() -> None:
    """Let a kept program that cannot be read be made anew, such as one that a full disk has cut short.

    jax warns of it, compiles, and leaves the file as it is: it would do so at every start. Here the files of a program
    of that name are removed when jax warns, which is before it would write.
    """
    before = warnings.showwarning

    def show(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        damaged = _DAMAGED_PROGRAM.match(str(message))
        if damaged is None:
            before(message, *args, **kwargs)
        else:
            _remove_programs(damaged[2])

    warnings.filterwarnings("always", _DAMAGED_PROGRAM.pattern, UserWarning)
    warnings.showwarning = show


def _remove_programs(name: str) -> None:
    import jax

    folder = jax.config.jax_compilation_cache_dir
    if folder is not None:
        for file in Path(folder).glob(f"{glob.escape(name)}-*-cache"):
            with contextlib.suppress(OSError):
                file.unlink()


def _malloc_is_set() -> bool:
    """Whether the user has settings of malloc in the environment."""
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return "glibc.malloc" in tunables or any(name.startswith("MALLOC_") for name in os.environ)


def _memory_is_limited() -> bool:
    """Whether to ask for much memory may fail, or take from what others get, even where none of it is used.

    Where malloc has once failed, it goes on in another heap, which cannot hold what this is about.
    """
    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    if any(limit != resource.RLIM_INFINITY for limit in limits):
        return True
    try:
        return _OVERCOMMIT.read_text().strip() == "2"  # the system's own limit, on what all processes ask for
    except OSError:
        return True


def _ask_for_huge_pages(libc: ctypes.CDLL) -> None:
    """For a block that is freed at once: it stays with the heap, and no page of it is there before it is used."""
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.madvise.argtypes, libc.free.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], [ctypes.c_void_p]
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    block = libc.malloc(size)
    if block:
        start = -(-block // _HUGE_PAGE) * _HUGE_PAGE
        libc.madvise(start, block + size - start, _MADV_HUGEPAGE)
        libc.free(block)


def _only_cpus() -> bool:
    """Whether jax can have no other devices: what it was told, or else what is installed."""
    if "JAX_PLATFORMS" in os.environ:
        return os.environ["JAX_PLATFORMS"] == "cpu"
    return not entry_points(group="jax_plugins") and find_spec("libtpu") is None
