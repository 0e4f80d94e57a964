import re

import numpy as np
import pytest

from convert.errors import SettingsError
from crossvit_jax.preprocess import UnreadableImage
from train.data.dense.voc import open_voc
from train.images.dense import decoded

_SETTINGS = {"val_fraction": 0.5, "seed": 0, "exif": "keep"}
_OBJECT = (
    "<object><name>{}</name><difficult>{}</difficult>"
    "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)


@pytest.fixture
def voc(tmp_path, picture):
    """Writes the XML file of a picture with its objects: class, difficult, xmin, ymin, xmax, ymax."""

    def write(name, *objects, size=(60, 40), folder="Annotations", filename=None):
        picture(f"JPEGImages/{name}.jpg")
        (tmp_path / folder).mkdir(exist_ok=True)
        sized = "<size><width>{}</width><height>{}</height><depth>3</depth></size>".format(*size) if size else ""
        text = "".join(_OBJECT.format(*values) for values in objects)
        content = f"<annotation><filename>{filename or name}.jpg</filename>{sized}{text}</annotation>"
        file = tmp_path / folder / f"{name}.xml"
        file.write_text(content)
        return file

    return write


@pytest.fixture
def two(voc):
    voc("a", ("dog", 0, 1, 1, 60, 40), ("cat", 1, 11, 6, 20, 25))
    voc("b", ("cat", 0, 2, 3, 4.5, 5))


def test_boxes_are_counted_from_one_and_difficult_ones_are_crowds(tmp_path, two):
    sets = open_voc(tmp_path, **_SETTINGS)
    assert (sets.class_names, sets.most_boxes, sets.held_out_split) == (("cat", "dog"), 1, "50% of the pictures")
    truths = {side.files[0]: side.truth(0) for side in (sets.train, sets.held_out)}
    objects = truths["JPEGImages/a.jpg"]["objects"]
    assert objects.boxes.tolist() == [[0, 0, 60, 40], [10, 5, 20, 25]]
    assert (objects.classes.tolist(), objects.crowd.tolist()) == ([1, 0], [False, True])
    assert objects.area.tolist() == [2400, 200]
    np.testing.assert_allclose(truths["JPEGImages/b.jpg"]["objects"].boxes, [[1, 2, 4.5, 5]])


def test_lists_tell_the_sides(tmp_path, two, voc):
    voc("c")
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("b\nc\n")
    (lists / "val.txt").write_text("a 1\n")
    sets = open_voc(tmp_path, **_SETTINGS)
    assert sets.train.files == ("JPEGImages/b.jpg", "JPEGImages/c.jpg")
    assert (sets.held_out.files, sets.held_out_split) == (("JPEGImages/a.jpg",), "val")
    (lists / "val.txt").write_text("x\n")
    with pytest.raises(SettingsError, match=r"val.txt names x, and there is no XML file for it"):
        open_voc(tmp_path, **_SETTINGS)


def test_xml_files_may_lie_beside_their_pictures_and_lack_a_size(tmp_path, picture, voc):
    for name in ("a", "b"):
        file = voc(name, ("dog", 0, 1, 1, 60, 40), size=(0, 0), filename="renamed since")
        file.rename(tmp_path / file.name)
        (tmp_path / "JPEGImages" / f"{name}.jpg").rename(tmp_path / f"{name}.jpg")
    (tmp_path / "Annotations").rmdir()
    sets = open_voc(tmp_path, **_SETTINGS)
    assert sets.train.truth(0)["size"] == (40, 60)
    assert sorted(sets.train.files + sets.held_out.files) == ["a.jpg", "b.jpg"]


def test_a_damaged_picture_of_unknown_size_is_a_bad_image_and_no_fault_of_its_boxes(tmp_path, two, voc):
    voc("c", ("dog", 0, 5, 5, 60, 40), size=None)
    (tmp_path / "JPEGImages" / "c.jpg").write_bytes(b"no picture")
    sets = open_voc(tmp_path, **_SETTINGS)
    sides = [(side, place) for side in (sets.train, sets.held_out) for place in range(len(side))]
    (sample,) = (side[place] for side, place in sides if side.files[place].endswith("c.jpg"))
    with pytest.raises(UnreadableImage, match=r"c\.jpg: it is in no image format"):
        decoded(sample)


@pytest.mark.parametrize(
    "objects, size, message",
    [
        ([("dog", 0, 10, 1, 5, 40)], (60, 40), "c.xml: box (9, 0, 5, 40) of JPEGImages/c.jpg, 60 x 40 pixels, has a"),
        ([("dog", 0, "x", 1, 5, 40)], (60, 40), "c.xml: xmin must be a number; got 'x'"),
        ([("", 0, 1, 1, 5, 40)], (60, 40), "c.xml has an object without name"),
        ([], (61, 40), "c.xml tells 61 x 40 pixels of {root}/JPEGImages/c.jpg, which has 60 x 40"),
    ],
)
def test_what_does_not_fit_together_names_the_xml_file(tmp_path, two, voc, objects, size, message):
    voc("c", *objects, size=size)
    with pytest.raises(SettingsError, match=re.escape(message.format(root=tmp_path))):
        open_voc(tmp_path, **_SETTINGS)


def test_a_missing_picture_and_broken_xml(tmp_path, two, voc):
    file = voc("c")
    (tmp_path / "JPEGImages" / "c.jpg").unlink()
    with pytest.raises(SettingsError, match=r"c\.xml is for the picture c\.jpg, which is missing"):
        open_voc(tmp_path, **_SETTINGS)
    file.write_text("<annotation>")
    with pytest.raises(SettingsError, match=r"c\.xml is no XML: no element found"):
        open_voc(tmp_path, **_SETTINGS)


def test_folders_without_boxes(tmp_path, voc):
    with pytest.raises(SettingsError, match="there is no folder"):
        open_voc(tmp_path / "x", **_SETTINGS)
    with pytest.raises(SettingsError, match="has no XML files"):
        open_voc(tmp_path, **_SETTINGS)
    voc("a")
    with pytest.raises(SettingsError, match=r"none of the 1 pictures in .* has a box"):
        open_voc(tmp_path, **_SETTINGS)
