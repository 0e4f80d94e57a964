import re

import numpy as np
import pytest

from convert.errors import SettingsError
from train.data.dense import yolo as yolo_module
from train.data.dense.yolo import open_yolo

_SETTINGS = {"val_fraction": 0.5, "seed": 0, "exif": "keep"}


@pytest.fixture
def yolo(tmp_path, picture):
    """Writes pictures with the lines of their boxes, and a data.yaml, whose path is returned."""

    def write(pictures, **content):
        for name, lines in pictures.items():
            picture(f"images/{name}.jpg")
            if lines is not None:
                labels = tmp_path / "labels" / f"{name}.txt"
                labels.parent.mkdir(parents=True, exist_ok=True)
                labels.write_text("\n".join(lines))
        content = {"train": "images/train", "val": "images/val", "names": "[cat, dog]"} | content
        file = tmp_path / "data.yaml"
        file.write_text("".join(f"{key}: {value}\n" for key, value in content.items() if value is not None))
        return file

    return write


_PICTURES = {
    "train/a": ["1 0.5 0.5 1 1", "0 0.25 0.5 0.5 0.25", ""],
    "train/b": None,
    "val/c": ["0 0.1 0.2 0.5 0.2 0.5 0.7 0.3 0.6"],
}


def test_shares_become_pixels_and_polygons_boxes(yolo):
    sets = open_yolo(yolo(_PICTURES), **_SETTINGS)
    assert (sets.class_names, sets.held_out_split, sets.most_boxes) == (("cat", "dog"), "val", 2)
    assert sets.train.files == ("images/train/a.jpg", "images/train/b.jpg")
    objects = sets.train.truth(0)["objects"]
    np.testing.assert_allclose(objects.boxes, [[0, 0, 60, 40], [0, 15, 30, 25]])
    assert objects.classes.tolist() == [1, 0]
    assert len(sets.train.truth(1)["objects"].boxes) == 0
    np.testing.assert_allclose(sets.held_out.truth(0)["objects"].boxes, [[6, 8, 30, 28]], rtol=1e-6)
    assert sets.train[0]["size"] == (40, 60)


def test_lists_of_files_names_by_number_and_roboflows_paths(tmp_path, yolo):
    file = yolo(_PICTURES, names="{0: cat, 1: dog}", train="../images/train", val="list.txt", nc=2)
    (tmp_path / "list.txt").write_text("./images/val/c.jpg\n")
    sets = open_yolo(tmp_path, **_SETTINGS)
    assert file.parent == tmp_path
    assert (len(sets.train), sets.held_out.files) == (2, ("images/val/c.jpg",))


def test_without_a_held_out_part_pictures_are_drawn(yolo):
    sets = open_yolo(yolo({"train/a": ["0 .5 .5 .2 .2"], "train/b": ["0 .5 .5 .2 .2"]}, val=None), **_SETTINGS)
    assert (len(sets.train), len(sets.held_out), sets.held_out_split) == (1, 1, "50% of the pictures")


@pytest.mark.parametrize(
    "lines, message",
    [
        (["0 0.5 0.5 0.2 0.2", "0 30 20 10 10"], "line 2 of {labels} has values beyond 0 to 1, shares of the picture"),
        (["2 0.5 0.5 0.2 0.2"], "line 1 of {labels} is of class 2: there are 2, numbered from 0"),
        (["0 0.5 0.5 0.2"], "line 1 of {labels} must be a class and 4 numbers, or a polygon; got '0 0.5 0.5 0.2'"),
        (["cat 0.5 0.5 0.2 0.2"], "line 1 of {labels} must be numbers; got 'cat 0.5 0.5 0.2 0.2'"),
        (["0 nan 0.5 0.2 0.2"], "line 1 of {labels} has values beyond 0 to 1, shares of the picture"),
    ],
)
def test_wrong_lines_are_told_with_their_number(tmp_path, yolo, lines, message):
    file = yolo(_PICTURES | {"train/a": lines})
    with pytest.raises(SettingsError, match=re.escape(message.format(labels=tmp_path / "labels/train/a.txt"))):
        open_yolo(file, **_SETTINGS)


@pytest.mark.parametrize(
    "content, message",
    [
        ({"names": "[cat, cat]"}, "has the same name for two classes"),
        ({"names": None}, "names no classes"),
        ({"names": "{0: cat, 2: dog}"}, "names must be numbered from 0 without gaps; got [0, 2]"),
        ({"nc": 3}, "tells nc 3, and has 2 names"),
        ({"train": None}, "names no pictures to train on"),
        ({"train": "nowhere"}, "train is nowhere, and there is no"),
        ({"names": "["}, "is no YAML"),
        ({"val": "data.yaml"}, "whose suffix is none of an image"),
    ],
)
def test_a_data_yaml_that_cannot_be_used(yolo, content, message):
    with pytest.raises(SettingsError, match=re.escape(message)):
        open_yolo(yolo(_PICTURES, **content), **_SETTINGS)


def test_a_folder_that_is_named_often_is_looked_through_once(yolo, monkeypatch):
    searched, search = [], yolo_module.image_files
    monkeypatch.setattr(yolo_module, "image_files", lambda folder: searched.append(folder) or search(folder))
    sets = open_yolo(yolo(_PICTURES, train=f"[{'images/train, ' * 1000}]"), **_SETTINGS)
    assert len(sets.train) == 2
    assert len(searched) == 2  # that and the one of val


def test_a_data_set_without_boxes(yolo):
    with pytest.raises(SettingsError, match=r"none of the 2 pictures to train on in .* has a box"):
        open_yolo(yolo(_PICTURES | {"train/a": None} | {"train/a": []}), **_SETTINGS)
