"""A run takes its classes in the order that was asked for, keeps it, and says where timm has another."""

import json

import numpy as np
import pytest

from convert import load_weights
from convert.errors import SettingsError
from tests.train.small_weights import save_small
from train.config import TrainConfig
from train.flags import parse_flags
from train.job import prepare
from train.recipes import RECIPES
from train.run.folder import read_settings, write_config
from train.tasks.classification import initial_weights

_TEXT, _NATURAL = ("class1", "class10", "class2"), ("class1", "class2", "class10")


@pytest.fixture
def settings(image_folder, small_variant):
    """Settings of a run on three folders whose order differs."""
    for i in range(12):
        image_folder(f"pictures/{_TEXT[i % 3]}/{i}.png", seed=i)
    given = {"dataset": f"folder:{image_folder()}/pictures", "variant": None, "batch_size": 4, "workers": 0}

    def _settings(**more):
        return TrainConfig(**{**vars(RECIPES["digits"]), **given, **more})

    return _settings


def _classes_by_file(source):
    samples = (source[i] for i in range(len(source)))
    return {sample["name"].rsplit("/", 2)[1]: sample["label"] for sample in samples}


def test_folders_are_in_text_order_unless_asked_for_otherwise_which_is_said(settings, tmp_path):
    (tmp_path / "names.txt").write_text("class2\nclass10\nclass1\n")
    told = "the classes are sorted as text: class 1 is 'class10', and 'class2' in timm's natural order; --class-order"
    orders = {None: _TEXT, "text": _TEXT, "natural": _NATURAL}
    orders[str(tmp_path / "names.txt")] = ("class2", "class10", "class1")
    fingerprints = set()
    for order, names in orders.items():
        job = prepare(settings(class_order=order))
        assert job.described["model"]["class_names"] == list(names)
        assert job.described["train"]["class_order"] == order
        for source in (job.image_sets.train, job.image_sets.held_out):
            assert _classes_by_file(source) == {name: names.index(name) for name in _TEXT}
        assert [note[: len(told)] for note in job.notes] == [told] * (order is None)
        fingerprints.add(job.image_sets.fingerprint)
    assert len(fingerprints) == 3  # text twice


def test_the_same_images_are_held_out_in_any_order(settings):
    held_out = [prepare(settings(class_order=order)).image_sets.held_out for order in ("text", "natural")]
    assert len({frozenset(source[i]["name"] for i in range(len(source))) for source in held_out}) == 1


def test_a_run_goes_on_in_its_order_even_if_the_file_has_gone(settings, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("class2\nclass10\nclass1\n")
    folder = tmp_path / "run"
    folder.mkdir()
    write_config(folder, prepare(settings(class_order=str(names), output=str(folder))).described)
    names.unlink()
    job = prepare(read_settings(str(folder)))
    assert job.resumed
    assert job.task.class_names == ("class2", "class10", "class1")
    with pytest.raises(SettingsError, match=r"cannot be continued with other settings: class_order was .* 'natural'"):
        prepare(parse_flags([f"--resume={folder}", "--class-order=natural"]))


def test_a_run_from_before_there_was_the_setting_goes_on_in_text_order(settings, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    described = prepare(settings(output=str(folder))).described
    del described["train"]["class_order"]
    write_config(folder, described)
    assert "class_order" not in json.loads((folder / "config.json").read_text())["train"]
    assert prepare(read_settings(str(folder))).task.class_names == _TEXT


def test_a_file_that_is_not_there_is_one_line(settings):
    with pytest.raises(SettingsError, match=r"--class-order: nowhere\.txt is neither natural nor text, nor a file"):
        prepare(settings(class_order="nowhere.txt"))


def test_the_head_of_the_same_classes_in_another_order_is_kept_and_put_into_theirs(settings, tmp_path):
    source = save_small(tmp_path / "w.safetensors", _NATURAL)
    stored = load_weights(source)
    weights = initial_weights(settings(init=str(source)), _TEXT)
    assert weights.class_names == _TEXT
    for name, tensor in stored.tensors.items():
        expected = tensor[[0, 2, 1]] if name.startswith("head") else tensor
        np.testing.assert_array_equal(weights.tensors[name], expected)
    assert weights.notes == ("the head is kept: it is for these classes, and its outputs are put into their order",)


def test_a_head_without_names_is_kept_and_the_order_is_said_once(settings, tmp_path):
    source = save_small(tmp_path / "w.safetensors", None, classes=3)
    notes = prepare(settings(init=str(source))).notes
    assert sum("timm's natural order" in note for note in notes) == 1
    assert sum("the head is kept: it has 3 classes too, and their names are not known" in note for note in notes) == 1
    notes = prepare(settings(init=str(source), class_order="natural")).notes
    assert not any("timm's natural order" in note for note in notes)
