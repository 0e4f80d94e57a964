"""Compiled programs outlive the process, and what a start computes besides is quick and the same."""

import jax
import pytest
from flax import nnx

from train.devices.compilation_cache import keep_compiled_programs
from train.optim.state import _Keys


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


def test_a_folder_that_the_user_chose_is_taken(cache_dir, tmp_path):
    cache_dir(str(tmp_path / "mine"))
    keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")


def test_keys_of_a_run_are_those_of_nnx():
    key = jax.random.key(3)
    ours, theirs = _Keys(key), nnx.Rngs(params=key)
    for _ in range(300):  # more than are made together
        assert (jax.random.key_data(ours.params()) == jax.random.key_data(theirs.params())).all()
