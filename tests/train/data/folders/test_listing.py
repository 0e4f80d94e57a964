"""CSV lists of image files as sources, and what is said of those that will not do."""

import dataclasses
import pickle

import numpy as np
import pytest

from convert.errors import SettingsError
from train.data.datasets import open_image_sets
from train.data.folders.classes import open_folder
from train.data.folders.listing import open_listed_split, open_listing
from train.inference.dataset import open_data
from train.recipes import RECIPES


@pytest.fixture
def write_list(tmp_path):
    def write(text, encoding="utf-8"):
        file = tmp_path / "list.csv"
        file.write_bytes(text.encode(encoding))
        return file

    return write


def _found(source):
    samples = [source[place] for place in range(len(source))]
    return [(sample["name"], sample["label"], len(sample["image"]) > 0) for sample in samples]


def test_a_list_with_splits(image_folder, write_list):
    for name in "abcde":
        image_folder(f"{name}.png")
    whole = image_folder("elsewhere/f.png")
    rows = [("a.png", "dog", "train"), ("b.png", "cat", "Training"), (whole, "cat", "train")]
    rows += [("c.png", "dog", "valid"), ("d.png", "cat", "test"), ("e.png", "dog", "val")]
    # as a spreadsheet may write it: a byte order mark, semicolons, an empty line, other columns
    text = "Filename;Class;Split;note\r\n" + "".join(f"{';'.join(map(str, row))};\r\n" for row in rows) + "\r\n"
    file = write_list(text, "utf-8-sig")
    sets = open_listing(file, val_fraction=0.1, seed=0)
    root = image_folder()
    assert (sets.class_names, sets.held_out_split, sets.sorted_by_name) == (("cat", "dog"), "val", True)
    expected = [(str(whole), 0, True), (f"{root}/b.png", 0, True), (f"{root}/a.png", 1, True)]
    assert _found(sets.train) == expected
    assert sets.train.paths() == [name for name, *_ in expected]
    assert _found(sets.held_out) == [(f"{root}/c.png", 1, True), (f"{root}/e.png", 1, True)]
    assert f"{file}/val has no images of 1 of the 2 classes: cat" in sets.notes
    assert pickle.loads(pickle.dumps(sets.train))[0] == sets.train[0]
    images, names, _ = open_listed_split(file, "test")
    assert (names, _found(images)) == (("cat", "dog"), [(f"{root}/d.png", 0, True)])
    with pytest.raises(SettingsError, match=r"has no split all: choose --split train or val or test"):
        open_listed_split(file, "all")


def test_a_list_without_splits_is_split_as_a_folder_is(image_folder, write_list):
    names = [f"{kind}/{place}.png" for kind in ("cat", "dog") for place in range(9)]
    for name in names:
        image_folder(f"pictures/{name}")
    order = np.random.default_rng(0).permutation(len(names))
    rows = [f"pictures/{names[place]},{names[place][:3]}\n" for place in order]
    file = write_list("path,label\n" + "".join(rows))
    sets = open_listing(file, val_fraction=0.3, seed=5)
    folder = open_folder(image_folder() / "pictures", val_fraction=0.3, seed=5)
    assert sets.held_out_split == folder.held_out_split == "30% of each class"
    for ours, theirs in ((sets.train, folder.train), (sets.held_out, folder.held_out)):
        assert _found(ours) == _found(theirs)
    config = dataclasses.replace(RECIPES["finetune"], dataset=f"csv:{file}", val_fraction=0.3, seed=5)
    assert open_image_sets(config).fingerprint == sets.fingerprint
    images, _, _ = open_listed_split(file, "all")
    assert sorted(_found(images)) == sorted(_found(sets.train) + _found(sets.held_out))
    for split, count in (("held-out", 6), ("train", 12), ("all", 18)):
        data = open_data({"dataset": f"csv:{file}", "val_fraction": 0.3, "seed": 5}, split, run=None)
        assert (len(data.images), data.class_names) == (count, ("cat", "dog"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty: its first line names the columns path and label"),
        ("a.png,cat\n", r"the first line of .* \(a\.png, cat\) has no column path or image or file"),
        ("path,image,label\n", "has more than one column path or image"),
        ("path,label\n", "lists no images"),
        ("path,label\na.png\n", "line 2 of .* has 1 columns, and the first line has 2"),
        ("path,label\na.png,\n", "line 2 of .* has no label"),
        ("path,label\n,cat\n", "line 2 of .* has no path"),
        ("path,label\na.png,cat\na.png,dog\n", "names a.png twice, in lines 2 and 3"),
        ("path,label,split\na.png,cat,fifth\n", "line 2 of .* has the split 'fifth'; known are train, val, test"),
        ("path,label,split\na.png,cat,train\n", "lists images of train: training needs train, and val or test"),
        ("path,label,split\na.png,cat,train\nb.png,dog,val\n", r"list\.csv has classes in val/ .* in train/: dog"),
        ("path,label\nc.png,cat\n", "none of the first 1 files of .* is there, such as .*c.png: paths are relative"),
        ("path,label\na.png,cat\nb.png,cat\nc.png,dog\n", "cannot be split: a class needs two images or more, unlike"),
    ],
)
def test_a_list_that_will_not_do_is_told_with_its_line(image_folder, write_list, text, message):
    for name in "ab":
        image_folder(f"{name}.png")
    with pytest.raises(SettingsError, match=message):
        open_listing(write_list(text), val_fraction=0.5, seed=0)


def test_a_file_that_is_no_list_is_told(tmp_path, write_list):
    with pytest.raises(SettingsError, match=r"cannot read .*: No such file"):
        open_listing(tmp_path / "none.csv", val_fraction=0.5, seed=0)
    with pytest.raises(SettingsError, match="is no CSV file: it is not UTF-8 text"):
        open_listing(write_list("päth", "latin-1"), val_fraction=0.5, seed=0)
