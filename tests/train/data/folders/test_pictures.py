"""Folders of pictures without classes."""

import pytest

from convert.errors import SettingsError
from train.config import TrainConfig
from train.data.datasets import open_image_sets
from train.data.sources import image_names
from train.recipes import RECIPES


def _open(folder, **settings):
    changes = {"dataset": f"folder:{folder}"} | settings
    return open_image_sets(TrainConfig(**{**_settings(), **changes}))


def _settings():
    recipe = RECIPES["pretraining"]
    return {name: getattr(recipe, name) for name in recipe.__dataclass_fields__}


def test_a_flat_folder_of_pictures_is_cut_by_the_seed(image_folder):
    for name in "abcdefghij":
        image_folder(f"{name}.png")
    (image_folder() / "notes.txt").write_text("no picture")
    sets = _open(image_folder(), val_fraction=0.2)
    names = image_names(sets.train) + image_names(sets.held_out)
    assert sorted(names) == [str(image_folder() / f"{name}.png") for name in "abcdefghij"]
    assert (len(sets.held_out), sets.class_names, sets.held_out_split) == (2, (), "20% of the pictures")
    assert sets.held_out[0]["label"] == 0 and sets.held_out[0]["name"] in names
    assert any("notes" in note or ".txt" in note for note in sets.notes)
    assert _open(image_folder(), val_fraction=0.2).fingerprint == sets.fingerprint
    others = [_open(image_folder(), val_fraction=0.2, seed=seed) for seed in (1, 2, 3)]
    assert any(image_names(other.held_out) != image_names(sets.held_out) for other in others)


def test_split_folders_may_hold_pictures_only(image_folder):
    for path in ("train/a.png", "train/b.png", "val/c.png"):
        image_folder(path)
    sets = _open(image_folder())
    assert (len(sets.train), len(sets.held_out), sets.held_out_split) == (2, 1, "val")
    (image_folder() / "val" / "c.png").unlink()
    (image_folder() / "val").rmdir()
    assert (len(_open(image_folder()).train), _open(image_folder()).held_out_split) == (1, "10% of the pictures")


def test_class_folders_are_classes_in_pretraining_too(image_folder):
    for path in ("cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png"):
        image_folder(path)
    assert _open(image_folder()).class_names == ("cat", "dog")


def test_too_few_pictures_are_refused(image_folder):
    (image_folder() / "notes.txt").write_text("no picture")
    with pytest.raises(SettingsError, match=f"no images in {image_folder()} "):
        _open(image_folder())
    image_folder("a.png")
    with pytest.raises(SettingsError, match="has one picture: one is trained on, and another one held out"):
        _open(image_folder())
    with pytest.raises(SettingsError, match="there is no folder"):
        _open(image_folder() / "missing")
    (image_folder() / "a.png").rename(image_folder("val/b.png"))
    with pytest.raises(SettingsError, match=r"has val/ and no train/"):
        _open(image_folder())
