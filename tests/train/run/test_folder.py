"""Whose a run's folder is, and what is said of a run that cannot be continued as it was asked for."""

import errno
import fcntl
import json
import os

import pytest

from convert.errors import SettingsError
from convert.metadata import describe
from crossvit_jax.config import get_config
from train.config import TrainConfig
from train.job import prepare
from train.run.folder import Claim, check_same_run, read_run


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_a_note(code, monkeypatch, tmp_path):
    assert Claim(tmp_path).note is None

    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    claim = Claim(tmp_path)
    assert claim.note == f"the file system of {tmp_path} has no locks: see to it that no other run writes there"
    claim.close()


def test_a_lock_that_fails_otherwise_is_a_clear_error(monkeypatch, tmp_path):
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(SettingsError, match=f"^cannot lock {tmp_path}: Input/output error$"):
        Claim(tmp_path)


def test_more_epochs_are_a_new_run_from_the_weights_of_the_old_one():
    saved = {"train": {"epochs": 4, "augment_on": "host"}, "model": {}, "data": {}}
    asked_for = {"train": {"epochs": 8, "augment_on": "host"}, "model": {}, "data": {}}
    with pytest.raises(SettingsError) as told:
        check_same_run(saved, asked_for, "runs/old")
    assert str(told.value) == (
        "the run in runs/old cannot be continued with other settings: epochs was 4 and is 8; a new run, with an "
        "--output of its own, can start from its weights: --init runs/old"
    )


def test_a_run_whose_data_have_gone_says_how_to_name_their_new_place(tmp_path):
    old = tmp_path / "old"
    begun = {"train": {"variant": "ti"}, "model": describe(get_config("ti", num_classes=2), ("a", "b"))}
    (tmp_path / "config.json").write_text(json.dumps(begun))
    with pytest.raises(SettingsError) as told:
        prepare(TrainConfig(dataset=f"folder:{old}", output=str(tmp_path), batch_size=8))
    assert str(told.value) == (
        f"there is no folder {old}; if the data of the run in {tmp_path} were moved, give their place anew with "
        "--dataset or --data-dir"
    )
    with pytest.raises(SettingsError, match=f"^there is no folder {old}$"):
        prepare(TrainConfig(dataset=f"folder:{old}", batch_size=8))


def test_scenes_of_earlier_versions_are_the_same_scenes(tmp_path):
    """They had the seed in their name, which decides nothing of them."""
    config = {"train": {}, "data": {"fingerprint": "digit scenes 1 detection seed=3"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_run(str(tmp_path))["data"] == {"fingerprint": "digit scenes 2 detection"}
