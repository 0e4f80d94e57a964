"""Programs on CPUs compute in memory that the process already has, and compiled programs outlive the process."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from train.devices.process import (
    _memory_is_limited,
    drop_damaged_programs,
    keep_compiled_programs,
    keep_freed_memory,
)

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the setting is glibc's")

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

# page faults of ten calls: where the block is kept, which now and then has no room for it, and where it never is
FEW, MANY = 150_000, 300_000

# the first product is 128 MiB of temporary memory, 32,768 pages of 4 KB
PROGRAM = """
import resource, sys
if sys.argv[1:]:
    resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[1]),) * 2)
from train.devices.process import keep_freed_memory
print(keep_freed_memory())
import jax, jax.numpy as jnp
products = jax.jit(lambda a, b: (a @ b) @ b.T)
a, b = jnp.ones((8192, 16)), jnp.ones((16, 4096))
assert products.lower(a, b).compile().memory_analysis().temp_size_in_bytes >= 128 * 2**20
for _ in range(2):
    products(a, b).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    products(a, b).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(any(line.startswith("VmFlags") and " hg" in line for line in open("/proc/self/smaps")))
"""


def run(*limit: str, **variables: str) -> tuple[bool, int, bool]:
    """Whether anything was changed, the page faults of ten calls, and whether huge pages were asked for."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    ours |= {"PYTHONPATH": ":".join(p for p in sys.path if p), "JAX_PLATFORMS": "cpu"} | variables
    result = subprocess.run([sys.executable, "-c", PROGRAM, *limit], env=ours, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    changed, faults, huge = result.stdout.split()
    return changed == "True", int(faults), huge == "True"


@linux_only
def test_no_fresh_pages_are_taken_for_a_programs_temporary_memory():
    changed, faults, huge = run()
    assert changed and faults < FEW
    assert huge or not HUGE_PAGES.exists() or _memory_is_limited()


@linux_only
def test_with_a_limit_on_memory_no_more_is_asked_for_than_needed():
    changed, faults, huge = run(str(4 * 2**30))
    assert changed and faults < FEW
    assert not huge


@linux_only
@pytest.mark.parametrize("variable", ["MALLOC_TOP_PAD_=131072", "GLIBC_TUNABLES=glibc.malloc.top_pad=131072"])
def test_a_setting_of_the_users_is_left_alone(variable):
    name, _, glibcs_default = variable.partition("=")  # as without the call
    changed, faults, huge = run(**{name: glibcs_default})
    assert not changed and not huge
    assert faults > MANY or _always_huge()


def _always_huge() -> bool:
    return HUGE_PAGES.exists() and "[always]" in HUGE_PAGES.read_text()


@linux_only
@pytest.mark.parametrize("platforms", ["cuda", "tpu,cpu"])
def test_nothing_is_changed_where_an_accelerator_computes(platforms, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert keep_freed_memory() is False


# --- compiled programs ---


@pytest.fixture
def cache_dir():
    before = jax.config.jax_compilation_cache_dir
    yield lambda value: jax.config.update("jax_compilation_cache_dir", value)
    jax.config.update("jax_compilation_cache_dir", before)


def test_programs_are_kept_in_the_users_cache_folder(cache_dir, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache_dir(None)
    keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "crossvit" / "jax")


def test_without_a_home_folder_no_programs_are_kept(cache_dir, monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda _: (_ for _ in ()).throw(KeyError("uid not found")))
    cache_dir(None)
    keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir is None


def test_a_folder_that_the_user_chose_is_taken(cache_dir, tmp_path):
    cache_dir(str(tmp_path / "mine"))
    keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")


def test_what_is_no_file_among_the_kept_programs_is_removed_and_all_else_stays(cache_dir, tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "jit_a-1-cache")
    (tmp_path / "jit_b-2-cache").symlink_to("/dev/zero")
    (tmp_path / "jit_c-3-cache").mkdir()
    (tmp_path / "jit_d-4-cache").write_bytes(b"x")
    os.mkfifo(tmp_path / "somebody's")
    cache_dir(str(tmp_path))
    keep_compiled_programs()
    assert {path.name for path in tmp_path.iterdir()} == {"jit_c-3-cache", "jit_d-4-cache", "somebody's"}

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    os.mkfifo(tmp_path / "jit_a-1-cache")
    monkeypatch.setattr(os, "unlink", refuse)
    try:
        keep_compiled_programs()
        assert not jax.config.jax_enable_compilation_cache
    finally:
        jax.config.update("jax_enable_compilation_cache", True)


def test_a_kept_program_that_was_cut_short_is_made_anew_once(tmp_path):
    settings = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in settings}
    with warnings.catch_warnings():
        try:
            for name, value in zip(settings, (str(tmp_path), 0.0), strict=True):
                jax.config.update(name, value)
            reset_cache()
            drop_damaged_programs()
            sizes = []
            for _ in range(3):
                assert jax.jit(lambda x: 3 * x + 1)(np.float32(2)) == 7
                (file,) = tmp_path.glob("jit__lambda*-cache")
                sizes.append(file.stat().st_size)
                if len(sizes) == 1:
                    os.truncate(file, sizes[0] // 2)  # what a full disk leaves
                jax.clear_caches()
            assert min(sizes) > 0.9 * max(sizes)
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            reset_cache()
