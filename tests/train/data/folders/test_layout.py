"""What a folder is: split folders and class folders, under whatever names, and what is said of them."""

import numpy as np
import pytest

from convert.errors import SettingsError
from train.config import TrainConfig
from train.data.datasets import check_trainable, open_image_sets
from train.data.folders.classes import open_folder, open_split
from train.data.folders.layout import split_of


@pytest.fixture
def opened(image_folder):
    """Makes a picture for each name, each with other pixels, and opens the folder."""

    def open(*names, folder="."):
        for seed, name in enumerate(names):
            image_folder(name, seed=seed)
        return open_folder(image_folder() / folder, val_fraction=0.5, seed=0)

    return open


def _names(source):
    return [source[index]["name"].rsplit("/", 1)[1] for index in range(len(source))]


@pytest.mark.parametrize(
    ("split", "names"),
    [
        ("train", "train TRAIN Train training Training_Set train_images train-data trn"),
        ("val", "val Val valid VALID validate validation Validation_set val-set dev eval evaluation"),
        ("test", "test Test TESTING tests test_set tst"),
        (None, "trains trainee valley vale valve testament contest street test1 devil 0"),
    ],
)
def test_split_folders_are_known_by_many_names(split, names):
    assert {name: split_of(name) for name in names.split()} == dict.fromkeys(names.split(), split)


@pytest.mark.parametrize(
    ("train", "held_out"),
    [("Training", "Testing"), ("TRAIN", "VALID"), ("train", "valid"), ("train_set", "Eval"), ("trn", "validation")],
)
def test_split_folders_are_never_classes(opened, train, held_out):
    names = [f"{split}/{name}/{split}{name}.png" for split in (train, held_out) for name in ("cat", "dog")]
    sets = opened(*names)
    assert (sets.class_names, sets.held_out_split) == (("cat", "dog"), held_out)
    assert _names(sets.train) == [f"{train}cat.png", f"{train}dog.png"]
    assert _names(sets.held_out) == [f"{held_out}cat.png", f"{held_out}dog.png"]


@pytest.mark.parametrize(
    ("train", "held_out"),
    [("seg_train", "seg_test"), ("train2017", "val2017"), ("ILSVRC2012_img_train", "ILSVRC2012_img_val")],
)
def test_split_folders_with_the_same_text_around_their_names_are_known(opened, train, held_out):
    names = [f"{split}/{name}/{split}{name}.png" for split in (train, held_out) for name in ("cat", "dog")]
    sets = opened(*names)
    assert (sets.class_names, sets.held_out_split) == (("cat", "dog"), held_out)
    assert _names(sets.train) == [f"{train}cat.png", f"{train}dog.png"]
    assert _names(sets.held_out) == [f"{held_out}cat.png", f"{held_out}dog.png"]


@pytest.mark.parametrize(
    "names",
    [
        [f"{name}/{i}.png" for name in ("bus_test", "bus_train") for i in "01"],  # images, and no folders
        [f"{name}/a/{i}.png" for name in ("bus_train", "car_test") for i in "01"],
        [f"{name}/a/{i}.png" for name in ("bus_train", "car_train") for i in "01"],
    ],
)
def test_other_folders_whose_names_hold_that_of_a_split_are_classes(opened, names):
    assert opened(*names).class_names == tuple(sorted({name.split("/")[0] for name in names}))


def test_valid_chooses_and_test_is_left_alone(opened):
    sets = opened(*(f"{split}/{name}/{split}.png" for split in ("train", "valid", "test") for name in "ab"))
    assert set(_names(sets.held_out)) == {"valid.png"}
    assert set(_names(sets.train)) == {"train.png"}
    assert sets.notes == ()


def test_where_only_test_is_there_it_is_said_that_it_chooses(opened):
    (note,) = opened("train/a/1.png", "train/b/2.png", "test/a/3.png", "test/b/4.png").notes
    assert "in training, test/ chooses the best checkpoint" in note


def test_a_class_may_be_called_train(opened):
    sets = opened(*(f"{name}/{i}{name}.png" for name in ("bus", "car", "Train") for i in range(2)))
    assert sets.class_names == ("Train", "bus", "car")


def test_folders_beside_the_split_folders_are_told(opened):
    (note,) = opened("train/a/1.png", "train/b/2.png", "val/a/3.png", "val/b/4.png", "c/5.png", ".d/6.png").notes
    assert note == "beside train/ and val/, these folders are left out: c"


def test_a_validation_folder_may_lack_classes_which_is_told(opened, image_folder):
    (image_folder() / "val" / "c").mkdir(parents=True)
    sets = opened("train/a/1.png", "train/b/2.png", "train/c/3.png", "val/b/4.png")
    assert sets.class_names == ("a", "b", "c")
    assert [sets.held_out[i]["label"] for i in range(len(sets.held_out))] == [1]
    assert sets.notes == (f"{image_folder()}/val has no images of 2 of the 3 classes: a, c",)


def test_each_split_can_be_opened_by_itself(opened, image_folder):
    opened(*(f"{split}/{name}/{split}.png" for split in ("Training", "valid", "test") for name in "ab"))
    (image_folder() / "test" / "a" / "test.png").unlink()
    for split, labels in (("train", [0, 1]), ("val", [0, 1]), ("test", [1])):
        source, names, _ = open_split(image_folder(), split)
        assert (names, source.labels.tolist()) == (("a", "b"), labels)
        assert set(_names(source)) == {{"train": "Training.png", "val": "valid.png", "test": "test.png"}[split]}
    with pytest.raises(SettingsError, match="has no split all: choose --split train or val or test"):
        open_split(image_folder(), "all")


def test_two_splits_without_one_for_training_can_be_opened_one_by_one(image_folder):
    for name in ("val/a/1.png", "val/b/2.png", "Testing/b/3.png"):
        image_folder(name)
    assert open_split(image_folder(), "val")[1] == ("a", "b")
    assert open_split(image_folder(), "test")[1] == ("b",)  # the classes that are there


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["a/x/1.png", "a/y/2.png"],
            "one class, a, a folder that holds the folders x, y: .*did you mean folder:.*/a[?]",
        ),
        (["a/train/x/1.png", "a/val/x/2.png"], "one class, a, a folder that holds the folders train, val: .*mean"),
        (["a/1.png", "a/2.png"], "has one class, a: training needs two or more$"),
        (["train/a/x/1.png", "val/a/2.png"], "one class, a, a folder that holds the folders x: training needs two or"),
    ],
)
def test_one_class_is_refused_in_training_with_what_may_be_meant(image_folder, names, message):
    for name in names:
        image_folder(name)
    config = TrainConfig(dataset=f"folder:{image_folder()}", val_fraction=0.5)
    with pytest.raises(SettingsError, match=message):
        check_trainable(config, open_image_sets(config))


def test_class_folders_that_hold_only_folders_are_said_aloud(opened):
    names = (
        "animal/cat/1.png",
        "animal/dog/2.png",
        "plant/rose/3.png",
        "plant/tulip/4.png",
        "tool/5.png",
        "tool/b/6.png",
    )
    (note,) = opened(*names).notes
    assert note == (
        "2 of 3 class folders hold only folders, and are one class each with all that is in them: animal (cat, dog), "
        "plant (rose, tulip)"
    )


def test_images_beside_the_class_folders_are_said_aloud(opened, image_folder):
    (note,) = opened("a/1.png", "a/2.png", "b/3.png", "b/4.png", "5.png", "6.jpg", ".7.png").notes
    assert note == f"2 image files in {image_folder()} itself, beside the class folders: left out"


def test_links_neither_multiply_nor_mislabel_pictures(opened, image_folder):
    opened(*(f"{name}/{i}.png" for name in ("cat", "dog") for i in range(3)))
    root = image_folder()
    for link, target in (
        *(("cat/cat", root / "cat"), ("cat/all", ".."), ("cat/dog", "../dog"), ("dog/loop", "loop")),
        *(("kitty", "cat"), ("everything", "."), ("above", "..")),
    ):
        (root / link).symlink_to(target)
    sets = opened()
    assert sets.class_names == ("cat", "dog")
    assert len(sets.train) + len(sets.held_out) == 6
    (note,) = (note for note in sets.notes if "links" in note)
    for link in ("cat/cat", "cat/all", "cat/dog", "kitty", "everything", "above"):
        assert f"{root}/{link}" in note


def test_links_to_pictures_elsewhere_work_as_classes_inside_them_and_for_files(opened, image_folder):
    for seed, name in enumerate(
        ("pool/x/1.png", "pool/y/2.png", "pool/z/3.png", "data/train/b/4.png", "data/val/b/5.png")
    ):
        image_folder(name, seed=10 + seed)
    root = image_folder() / "data"
    (root / "val" / "a").mkdir()
    for link, target in (
        *(("train/a", "../../pool/x"), ("train/b/more", "../../../pool/y")),
        ("val/a/6.png", "../../../../pool/z/3.png"),
    ):
        (root / link).symlink_to(target if "6" not in link else image_folder() / "pool/z/3.png")
    sets = opened(folder="data")
    assert sets.class_names == ("a", "b")
    assert _names(sets.train) == ["1.png", "4.png", "2.png"]
    assert _names(sets.held_out) == ["6.png", "5.png"]
    assert sets.notes == ()


def test_a_link_from_one_split_into_the_other_is_not_followed(opened, image_folder):
    opened("train/a/1.png", "train/b/2.png", "val/a/3.png", "val/b/4.png")
    (image_folder() / "train" / "a" / "more").symlink_to("../../val/a")
    assert _names(opened().train) == ["1.png", "2.png"]


def test_what_is_left_out_is_one_line_for_both_splits(opened, image_folder):
    opened("train/a/1.png", "train/b/2.png", "val/a/3.png", "val/b/4.png")
    for name in ("train/a/5.heic", "val/b/6.HEIC", "val/b/7.txt"):
        (image_folder() / name).touch()
    assert opened().notes == ("left out, as their suffix is none of an image: 2 .heic, 1 .txt",)


def test_the_fingerprint_of_folders_as_they_were_is_as_it_was(opened):
    """A run goes on with the images that it began with: these are what version 0.1.0 saw."""
    sets = opened(*(f"{name}/{i}.png" for name in ("b", "a") for i in range(4)))
    assert sets.fingerprint == "2d010bccb8f9412b838ee4c12e5d8bcd03dfae3d0d3690f3d4b264dde937f221"
    assert np.array_equal(sets.train.labels, [0, 0, 1, 1])
