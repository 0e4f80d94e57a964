"""Folders of class folders as sources, and what is said of those that will not do."""

import os
import pickle
import shutil

import pytest

from convert.errors import SettingsError
from crossvit_jax.preprocess import UnreadableImage
from train.data.folders.classes import open_folder


def _labels_by_file(source):
    return {source[i]["name"].split("/")[-1]: source[i]["label"] for i in range(len(source))}


@pytest.mark.parametrize("held_out", ["val", "validation", "test"])
def test_a_folder_with_two_sides(image_folder, held_out):
    for path in ("train/cat/1.png", "train/cat/deep/2.JPG", "train/dog/3.png", f"{held_out}/cat/4.png"):
        image_folder(path)
    image_folder(f"{held_out}/dog/5.jpeg")
    (image_folder() / "train" / "dog" / "notes.txt").write_text("no image")
    sets = open_folder(image_folder(), val_fraction=0.1, seed=0)
    assert sets.class_names == ("cat", "dog")
    assert _labels_by_file(sets.train) == {"1.png": 0, "2.JPG": 0, "3.png": 1}
    assert _labels_by_file(sets.held_out) == {"4.png": 0, "5.jpeg": 1}
    assert pickle.loads(pickle.dumps(sets.train))[0] == sets.train[0]


def test_one_folder_is_split_by_class_and_seed(image_folder):
    for i in range(30):
        image_folder(f"cat/{i}.png")
    for i in range(30, 35):
        image_folder(f"dog/{i}.png")

    def held_out(seed):
        sets = open_folder(image_folder(), val_fraction=0.2, seed=seed)
        train, val = _labels_by_file(sets.train), _labels_by_file(sets.held_out)
        assert not set(train) & set(val)
        assert len(train) + len(val) == 35
        assert sorted(val.values()) == [0] * 6 + [1]
        return set(val)

    assert held_out(0) == held_out(0)
    assert held_out(0) != held_out(1)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no class folders"),
        (["train/cat/1.png"], "none of validation/, val/, test/"),
        (["train/cat/1.png", "val/dog/1.png"], "classes in val/ that are missing in train/: dog"),
        (["train/cat/1.png", "train/dog/1.png", "val/dog/1.txt.png/x"], "no images in any of the 2 class folders"),
        (["train/cat/1.png", "Training/cat/1.png"], "more than one folder for train: Training/, train/"),
        (["train/cat/1.png", "val/cat/1.png", "valid/cat/1.png"], "more than one folder for val: val/, valid/"),
        (["train/1.png", "test/2.png"], "train has no class folders"),
        (["Test/cat/1.png", "VALID/cat/1.png"], "VALID/ and Test/ and no train/: .*--split val or test of train"),
        (["test/cat/1.png", "cat/1.png"], "has test/ and no train/"),
        (["cat/1.png", "dog/1.png", "dog/2.png"], "two images or more, unlike cat"),
    ],
)
def test_a_folder_that_will_not_do_is_a_clear_error(image_folder, files, message):
    for file in files:
        if file.endswith("x"):
            (image_folder() / file).mkdir(parents=True)
        else:
            image_folder(file)
    with pytest.raises(SettingsError, match=message):
        open_folder(image_folder(), val_fraction=0.1, seed=0)


def test_a_class_without_images_is_a_clear_error(image_folder):
    image_folder("cat/1.png")
    (image_folder() / "dog").mkdir()
    with pytest.raises(SettingsError, match=r"no images in .*dog"):
        open_folder(image_folder(), val_fraction=0.1, seed=0)


def test_a_folder_of_class_folders_without_images_is_a_clear_error(image_folder):
    for i in range(30):
        (image_folder() / f"{i:02}").mkdir()
    with pytest.raises(SettingsError, match=r"no images in any of the 30 class folders of "):
        open_folder(image_folder(), val_fraction=0.1, seed=0)
    image_folder("30/1.png")
    with pytest.raises(SettingsError, match=r"no images in .*/00, .*/19 and 10 more \(looked for"):
        open_folder(image_folder(), val_fraction=0.1, seed=0)


def test_a_file_that_has_vanished_is_an_unreadable_image(image_folder):
    for i in range(3):
        file = image_folder(f"only/{i}.png")
    source = open_folder(image_folder(), val_fraction=0.1, seed=0).train
    os.remove(os.path.join(source.root, source.files[1]))
    with pytest.raises(UnreadableImage, match=rf"cannot read image {file.parent}/\d.png: No such file or directory"):
        source[1]
    assert source[0]["image"]


def test_the_fingerprint_of_a_folder_follows_names_labels_and_sides_only(image_folder):
    def fingerprint(folder="", **settings):
        return open_folder(image_folder() / folder, **({"val_fraction": 0.3, "seed": 0} | settings)).fingerprint

    for i in range(10):
        image_folder(f"a/{'xy'[i % 2]}/{i}.png")
    seen = [fingerprint("a")]
    assert fingerprint("a") == seen[0]
    shutil.copytree(image_folder() / "a", image_folder() / "b")
    assert fingerprint("b") == seen[0]  # it may be moved
    seen.append(fingerprint("a", seed=1))  # other images are held out
    image_folder("a/x/new.png")
    seen.append(fingerprint("a"))
    (image_folder() / "a/x/new.png").rename(image_folder() / "a/y/new.png")
    seen.append(fingerprint("a"))
    (image_folder() / "a/y").rename(image_folder() / "a/z")
    seen.append(fingerprint("a"))
    for side in ("train", "val"):
        image_folder(f"two/{side}/only/1.png")
    seen.append(fingerprint("two"))
    image_folder("two/val/only/2.png")
    seen.append(fingerprint("two"))
    assert len(set(seen)) == 7


def test_a_folder_that_is_not_there_is_a_clear_error(tmp_path):
    with pytest.raises(SettingsError, match="no folder"):
        open_folder(tmp_path / "nowhere", val_fraction=0.1, seed=0)
