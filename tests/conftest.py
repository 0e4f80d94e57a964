"""What holds in every test: programs are compiled quickly and once in a run; what a run tells at its end.

Under `pytest -n` several processes share the cores and the folder of compiled programs.
"""

import collections
import ctypes
import gc
import os
import resource
import sys
import tempfile
from collections.abc import Iterator
from pathlib import PurePath

import jax
import psutil
import pytest
import torch
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from tests import compilation

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Sets how programs are compiled: here, in the processes of `pytest -n` and in those that tests start.

    They are looked up in a folder of this run, which is empty at its start.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="compiled-programs-", ignore_cleanup_errors=True)
        config.add_cleanup(folder.cleanup)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {compilation.xla_flags()}"
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    reset_cache()


def pytest_collection_finish() -> None:
    """What the tests import stays: the garbage collector, which would look at millions of objects, leaves it out."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)  # tracing makes many objects, and hardly any of them are garbage


def pytest_unconfigure() -> None:
    """Of what the collector leaves out as Python ends, nanobind prints, below pytest's last line, that it leaked."""
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_are_dropped() -> Iterator[None]:
    """A process that holds much lets go of its programs; others find those of earlier modules again."""
    yield
    if psutil.Process().memory_info().rss < 3 * 2**30:
        return
    jax.clear_caches()
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules with slow tests come first, and are not torn apart: they share fixtures.

    With `--dist worksteal` the short tests are then what is left to steal, and no worker is alone with a long one while
    the others have run out.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


# --- what a run has cost ---

_cpu = 0.0  # seconds that this process and those that it has waited for had computed at the last report


def _cpu_seconds() -> float:
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def pytest_runtest_logstart() -> None:
    global _cpu
    _cpu = _cpu_seconds()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    global _cpu
    report = yield
    before, _cpu = _cpu, _cpu_seconds()
    report.user_properties += [("cpu", _cpu - before), ("memory", _memory()), ("process", os.getpid())]
    return report


def _memory() -> tuple[float, float]:
    """GiB that this process has taken at most, and that it holds."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # from KiB
    return most, psutil.Process().memory_info().rss / 2**30


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The sum of each folder. The slowest tests are pytest's `--durations`."""
    reports = [report for kind in ("passed", "failed", "skipped", "") for report in terminalreporter.getreports(kind)]
    folders = collections.defaultdict(lambda: [0, 0.0, 0.0])
    memory: dict[int, tuple[float, float]] = {}  # of each process, as it was at last
    for report in reports:
        told = dict(report.user_properties)
        if "cpu" in told:
            entry = folders[str(PurePath(report.nodeid.partition("::")[0]).parent)]
            for index, value in enumerate((report.when == "call", report.duration, told["cpu"])):
                entry[index] += value
            memory[told["process"]] = told["memory"]
    if not folders:
        return
    terminalreporter.section("time by folder")
    terminalreporter.write_line(f"{'folder':24}{'tests':>6}{'seconds':>9}{'CPU seconds':>13}")
    folders = sorted(folders.items(), key=lambda entry: -entry[1][2])
    for name, entry in [*folders, ("all", [sum(column) for column in zip(*(e for _, e in folders), strict=True)])]:
        terminalreporter.write_line(f"{name:24}{entry[0]:6}{entry[1]:9.0f}{entry[2]:13.0f}")
    told = [f"{most:.1f} at most, {held:.1f} at the end" for most, held in memory.values()]
    terminalreporter.write_line(f"memory of the test processes in GiB: {'; '.join(told)}")
