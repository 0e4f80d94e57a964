"""What is taken for damage, and what is not; and folders that hold no run to continue."""

import gc
import json
import logging
import resource
import signal
import time
from contextlib import closing

import jax
import jax.numpy as jnp
import pytest

from convert.errors import SettingsError
from train.run.checkpoints import Checkpoints
from train.run.folder import CheckpointError, newest_checkpoint, read_run
from train.run.run_state import RunState


@pytest.fixture
def folder(tmp_path):
    """A run's folder with one checkpoint, of step 1."""
    with closing(Checkpoints(tmp_path, description={}, say=print)) as checkpoints:
        checkpoints.save({"params": jnp.ones(3)}, RunState(step=1), {})
        checkpoints.wait()
    return tmp_path


def _restore(folder):
    shapes = {"params": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=jnp.ones(3).sharding)}
    with closing(Checkpoints(folder, description={}, say=print)) as checkpoints:
        return checkpoints.restore(shapes)


def _steps(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize("error", [RuntimeError("RESOURCE_EXHAUSTED: out of memory"), MemoryError()])
def test_too_little_memory_is_no_damage(folder, monkeypatch, error):
    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_read", fail)
        with pytest.raises(type(error)):
            _restore(folder)
    assert _steps(folder) == ["1"]
    assert _restore(folder)[1].step == 1


def test_where_no_checkpoint_can_be_read_all_stay_where_they_are(folder, monkeypatch):
    def fail(*_):
        raise ValueError("truncated")

    monkeypatch.setattr(Checkpoints, "_read", fail)
    for _ in range(2):  # a second start finds what the first one found
        with pytest.raises(CheckpointError, match="none of the checkpoints"):
            _restore(folder)
        assert newest_checkpoint(folder) == 1


def test_a_run_of_which_only_damaged_checkpoints_are_left_does_not_start_anew(folder):
    (folder / "checkpoints" / "1").rename(folder / "checkpoints" / "1.damaged")
    with pytest.raises(CheckpointError, match="are damaged"):
        newest_checkpoint(folder)


@pytest.mark.parametrize("content", [{"model_type": "vit"}, ["a list"], {"train": "fast"}])
def test_the_config_of_another_program_is_one_line(tmp_path, content):
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(SettingsError, match=r"config\.json was written by another program"):
        read_run(str(tmp_path))


def test_a_checkpoint_damaged_a_second_time_is_put_aside_as_the_first_was(folder):
    for names in (["1", "2.damaged"], ["1", "2.damaged", "2.damaged-2"]):
        with closing(Checkpoints(folder, description={}, say=print)) as checkpoints:
            checkpoints.save({"params": jnp.ones(3)}, RunState(step=2), {})
            checkpoints.wait()
        file = folder / "checkpoints" / "2" / "progress" / "metadata"
        file.write_text(file.read_text().replace('"log_bytes": 0', '"log_bytes": 1'))
        assert _restore(folder)[1].step == 1
        assert _steps(folder) == names


def test_a_save_that_fails_in_the_background_is_told_before_the_next_one(tmp_path, capfd):
    with closing(Checkpoints(tmp_path, description={}, say=print)) as checkpoints:
        checkpoints.save({"params": jnp.ones(3)}, RunState(step=1), {})
        checkpoints.wait()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))  # as a full disk
            with pytest.raises(CheckpointError, match=r"step 2\): .*; the last whole one is of step 1"):
                checkpoints.save({"params": jnp.arange(30_000.0)}, RunState(step=2), {})
                for _ in range(3000):
                    checkpoints.check()
                    time.sleep(0.01)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, before)
    gc.collect()
    assert capfd.readouterr().err == ""


def test_where_the_storage_fails_to_close_its_threads_are_silent_to_the_end(tmp_path, monkeypatch, capfd):
    level = logging.getLogger("absl").level
    checkpoints = Checkpoints(tmp_path, description={}, say=print)
    close = checkpoints._manager.close

    def fail():
        close()
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

    monkeypatch.setattr(checkpoints._manager, "close", fail)
    try:
        checkpoints.close()
        logging.getLogger("absl").error("a thread of Orbax's, after all has ended")
        assert capfd.readouterr().err == ""
    finally:
        logging.getLogger("absl").setLevel(level)
