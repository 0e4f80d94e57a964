"""Pictures that are on both sides are found by their content, and at a bounded cost."""

import os

import pytest

import train.data.folders.shared
from train.data.folders.classes import open_folder
from train.data.folders.shared import shared_images


@pytest.fixture
def write(tmp_path):
    def _write(name, content):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    return _write


def test_the_same_bytes_under_another_name_are_told(image_folder):
    for seed, name in enumerate(("train/a/1.png", "train/b/2.png", "val/a/3.png", "val/b/4.png", "val/b/6.png")):
        image_folder(name, seed=seed)
    image_folder("val/a/5.png", seed=1)  # what train/b/2.png is: also another class
    (image_folder() / "val" / "b" / "7.png").symlink_to(image_folder() / "train" / "a" / "1.png")
    root = image_folder()
    assert open_folder(root, val_fraction=0.1, seed=0).notes == (
        f"2 of 5 held-out images are training images too, byte for byte: {root}/val/a/5.png is {root}/train/b/2.png",
    )


def test_copies_in_one_folder_are_told_where_they_fall_on_both_sides(image_folder):
    for name in ("a/1.png", "a/2.png", "b/3.png", "b/4.png"):
        image_folder(name, seed=len(name) + ("b" in name))
    (note,) = open_folder(image_folder(), val_fraction=0.5, seed=0).notes
    assert note.startswith("2 of 2 held-out images are training images too")


def test_only_whole_contents_count(write):
    border = bytes(5000)
    train = [write("train/a/1", border + b"x" + border), write("train/a/2", b""), write("train/a/3", b"123")]
    held_out = [write("val/a/4", border + b"y" + border), write("val/a/5", b""), write("val/a/6", b"124")]
    assert shared_images(train, held_out) == []
    held_out.append(write("val/a/7", border + b"x" + border))
    assert shared_images(train, [*held_out, "/gone"]) == [(train[0], held_out[-1])]


def test_of_many_files_only_those_of_the_same_class_and_name_are_looked_at(write, monkeypatch):
    monkeypatch.setattr(train.data.folders.shared, "_LOOKED_AT", 3)
    asked, stat = [], os.stat
    trained = [write("train/a/1", b"1"), write("train/a/2", b"2"), write("train/b/3", b"3")]
    held_out = [write("val/a/1", b"1"), write("val/a/3", b"3"), write("val/b/4", b"2")]
    monkeypatch.setattr(os, "stat", lambda path, **how: asked.append(path) or stat(path, **how))
    assert shared_images(trained, held_out) == [(trained[0], held_out[0])]
    assert set(asked) == {trained[0], held_out[0]}
