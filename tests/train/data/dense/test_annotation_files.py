"""Annotations and classes that nobody wrote with care, or somebody with intent. `tests/fuzz/dense.py` tries more."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from convert.errors import SettingsError
from train.data.dense.masks import read_mask
from train.data.dense.open import open_dense_sets

_ALIASES = "a: &a0 [x, x]\n" + "".join(f"b{i}: &a{i + 1} [{f'*a{i}, ' * 9}]\n" for i in range(9)) + "names: *a9\n"


def _refused(dataset, kind="detection"):
    with pytest.raises(SettingsError) as refused:
        open_dense_sets(dataset, kind, seed=0, val_fraction=0.5)
    return str(refused.value)


@pytest.mark.parametrize("name", ["all.json", "data.yaml", "classes.txt", "Annotations/1.xml"])
def test_a_named_pipe_is_not_waited_for(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / name)
    of = {"data.yaml": "yolo", "classes.txt": "masks", "Annotations/1.xml": "voc"}
    format = of.get(name, "coco")
    place = tmp_path if format in ("masks", "voc") else tmp_path / name
    told = _refused(f"{format}:{place}", "segmentation" if format == "masks" else "detection")
    assert "a named pipe" in told or "no file or folder" in told


def test_labels_that_are_no_file_are_not_taken_for_none(tmp_path, picture):
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    picture("images/a.jpg")
    (tmp_path / "data.yaml").write_text("names: [a]\ntrain: images\n")
    os.mkfifo(tmp_path / "labels" / "a.txt")
    assert "a.txt: it is a named pipe" in _refused(f"yolo:{tmp_path}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (_ALIASES, "aliases (*name) are not read"),
        ("[" * 3000, "nested too deeply"),
        ("names: [[a], b]\ntrain: x", "names must be texts; got ['a']"),
        ("names: {0: a, x: b}\ntrain: x", "numbered from 0 without gaps; got [0, 'x']"),
        ("names: [a]\ntrain: {b: c}", "train must be a path, or a list of some; got {'b': 'c'}"),
        ("names: [a]\npath: [b]\ntrain: c", "path must be that of a folder; got ['b']"),
        ("names: [2001-13-01]", "is no YAML"),
    ],
)
def test_yaml_that_means_no_data_set(tmp_path, text, message):
    (tmp_path / "data.yaml").write_text(text)
    assert message in _refused(f"yolo:{tmp_path}")


@pytest.mark.parametrize(
    ("key", "entry", "message"),
    [
        ("annotations", "x", "annotations must be a list of objects; got 'x' in it"),
        (
            "annotations",
            {"id": 1, "image_id": 1, "category_id": {}, "bbox": [0, 0, 1, 1]},
            "category_id must be a whole",
        ),
        (
            "annotations",
            {"id": [], "image_id": 1, "category_id": 1, "bbox": [0, 0, 10**400, 1]},
            "has as bbox [0, 0, 1000",
        ),
        ("images", {"id": 10**40, "file_name": "a.jpg"}, "id must be a whole number; got 1000"),
        ("categories", {"id": 7, "name": "b", "supercategory": [[]]}, None),
    ],
)
def test_entries_of_coco_that_are_none(tmp_path, picture, key, entry, message):
    for name in ("a.jpg", "b.jpg"):
        picture(name)
    boxes = [{"id": n, "image_id": n, "category_id": 1, "bbox": [1, 1, 5, 5]} for n in (1, 2)]
    content = {"images": [{"id": n, "file_name": f"{'ab'[n - 1]}.jpg"} for n in (1, 2)], "annotations": boxes}
    content["categories"] = [{"id": 1, "name": "a"}]
    content[key].append(entry)
    (tmp_path / "all.json").write_text(json.dumps(content))
    if message is None:
        assert open_dense_sets(f"coco:{tmp_path / 'all.json'}", "detection", seed=0, val_fraction=0.5)
    else:
        assert message in _refused(f"coco:{tmp_path / 'all.json'}")


def test_values_below_0_are_of_no_class(tmp_path):
    classes = np.arange(256, dtype=np.uint8)
    Image.fromarray(np.full((3, 4), -1, np.int32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="it has -1 at x 0, y 0, which is none of the 254 classes"):
        read_mask((tmp_path / "a.tif").read_bytes(), "a", classes)


def test_large_masks_are_looked_up_in_parts_and_a_wrong_value_has_its_place(tmp_path):
    values = np.zeros((1100, 1000), np.uint8)  # two parts
    values[1099, 3] = 2
    Image.fromarray(values).save(tmp_path / "a.png")
    encoded, classes = (tmp_path / "a.png").read_bytes(), np.array([0, 1, 5] + [254] * 253, np.uint8)
    assert read_mask(encoded, "a", classes)[1099, 3] == 5
    classes[2] = 254
    with pytest.raises(ValueError, match="it has 2 at x 3, y 1099"):
        read_mask(encoded, "a", classes)
