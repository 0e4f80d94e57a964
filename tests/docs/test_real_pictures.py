"""The script that makes data sets of what other packages carry, with made-up packages of the same layout."""

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.docs.scripts import load_script
from train.data.dense.open import open_dense_sets

_HELD_OUT = "2019_YELL_2_541000_4977000_image_crop"
_KEPT, _LOST = (200, 10, 250, 30), (230, 50, 330, 70)  # cut at 240: 80 % and 20 % are left; 10 % and 90 %


@pytest.fixture(scope="module")
def script():
    return load_script("real_pictures")


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder of packages that cannot be imported, in which Python looks first."""
    folder = tmp_path / "packages"
    for name in ("deepforest/data", "stardist/data/images", "nilearn/datasets/data"):
        (folder / name).mkdir(parents=True)
    for name in ("deepforest", "stardist", "nilearn"):
        (folder / name / "__init__.py").write_text("raise RuntimeError")
    monkeypatch.syspath_prepend(str(folder))
    return folder


def _photograph(folder, name, boxes):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (240, 400, 3), np.uint8)).save(folder / f"{name}.png")
    objects = "".join(
        "<object><name>Tree</name><bndbox>"
        + "".join(f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
        + "</bndbox></object>"
        for box in boxes
    )
    (folder / f"{name}.xml").write_text(f"<annotation><filename>{name}.png</filename>{objects}</annotation>")


def test_photographs_are_cut_with_their_boxes(script, packages, tmp_path, capsys):
    for name in ("forest", _HELD_OUT):
        _photograph(packages / "deepforest/data", name, [_KEPT, _LOST])
    assert script.main(["trees", str(tmp_path / "trees")]) == 0
    assert capsys.readouterr().out == "train: 2 pictures with 3 trees\nval: 2 pictures with 3 trees\n"
    about = json.loads((tmp_path / "trees/annotations/instances_train.json").read_text())
    assert [image["file_name"] for image in about["images"]] == ["forest-0-0.png", "forest-160-0.png"]
    # the second tile begins at 160: both boxes are whole in it
    boxes = [(entry["image_id"], entry["bbox"]) for entry in about["annotations"]]
    assert boxes == [(1, [200, 10, 40, 20]), (2, [40, 10, 50, 20]), (2, [70, 50, 100, 20])]
    with Image.open(packages / "deepforest/data/forest.png") as whole:
        right = np.asarray(whole)[:, 160:]
    with Image.open(tmp_path / "trees/images/train/forest-160-0.png") as tile:
        np.testing.assert_array_equal(np.asarray(tile), right)
    sets = open_dense_sets(f"coco:{tmp_path / 'trees'}", "detection", seed=0, val_fraction=0.1)
    assert (len(sets.train), len(sets.held_out), sets.most_boxes, sets.class_names) == (2, 2, 2, ("tree",))

    assert script.main(["photographs", str(tmp_path / "whole")]) == 0
    sets = open_dense_sets(f"coco:{tmp_path / 'whole'}", "detection", seed=0, val_fraction=0.1)
    np.testing.assert_array_equal(sets.held_out.truth(0)["objects"].boxes, [_KEPT, _LOST])
    assert sets.held_out.truth(0)["image_id"] == 1


def test_clearings_are_windows_with_a_tree_or_none_and_no_row_is_on_both_sides(script, packages, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "WINDOW", 80)
    whole, cut, in_val = (10, 10, 40, 40), (85, 90, 145, 130), (300, 170, 330, 200)
    _photograph(packages / "deepforest/data", Path(script.CLEARINGS_PHOTOGRAPH).stem, [whole, cut, in_val])
    assert script.main(["clearings", str(tmp_path / "clearings")]) == 0
    # of 400 x 240 pixels the upper 160 are trained on: three rows of windows, and one
    places = {
        (side, name): {file.stem for file in (tmp_path / "clearings" / side / name).iterdir()}
        for side in ("train", "val")
        for name in ("ground", "tree")
    }
    assert {"0-0", "80-40", "80-80"} <= places["train", "tree"] and "160-0" in places["train", "ground"]
    assert "40-80" in places["train", "tree"]  # 35 of 60 columns of the second tree
    assert not any("120-40" in names for names in places.values())  # 31 % of it: neither a tree nor none
    assert places["val", "tree"] == {"240-160", "280-160"}
    assert places["val", "ground"] == {f"{x}-160" for x in range(0, 240, 40)}


def test_tiles_cover_a_photograph(script):
    assert script.starts(240, 240, 240) == script.starts(100, 240, 240) == [0]
    assert script.starts(600, 240, 240) == [0, 240, 360]
    assert script.starts(480, 240, 240) == [0, 240]


def test_nuclei_are_binary_and_the_right_half_is_held_out(script, packages, tmp_path):
    mask = np.zeros((128, 256), np.uint16)
    mask[10:20, 30:40], mask[50:60, 200:210] = 7, 125
    for name, pixels in (("mask2d", mask), ("img2d", mask * 9)):
        Image.fromarray(pixels).save(packages / f"stardist/data/images/{name}.tif")
    assert script.main(["nuclei", str(tmp_path / "nuclei")]) == 0
    sets = open_dense_sets(f"masks:{tmp_path / 'nuclei'}", "segmentation", seed=0, val_fraction=0.1)
    assert sets.class_names == ("background", "nucleus")
    assert (len(sets.train), len(sets.held_out)) == (4, 4)
    by_name = {Path(sets.train.files[place]).stem: sets.train.truth(place)["segments"] for place in range(4)}
    np.testing.assert_array_equal(by_name["32-32"], mask[32:, 32:128] > 0)
    by_name = {Path(sets.held_out.files[place]).stem: sets.held_out.truth(place)["segments"] for place in range(4)}
    np.testing.assert_array_equal(by_name["32-0"], mask[:96, 160:] > 0)


def test_tissue_is_told_by_the_largest_share_and_a_slab_is_held_out(script, packages, tmp_path):
    shape = (5, 6, 150)
    brain, grey, white = (np.zeros(shape, np.uint8) for _ in range(3))
    brain[1:, 1:], grey[2, 2], grey[2, 3], white[2, 3], white[3, 3] = 200, 200, 100, 140, 90
    for name, volume in (("t1", brain), ("gm", grey), ("wm", white)):
        head = bytearray(352)
        head[40:56], head[70:72] = struct.pack("<8h", 3, *shape, 1, 1, 1, 1), struct.pack("<h", 2)
        head[108:112] = struct.pack("<f", 352)
        file = packages / "nilearn/datasets/data" / script.TISSUE_FILE.format(name)
        file.write_bytes(gzip.compress(bytes(head) + volume.tobytes(order="F")))
    assert script.main(["tissue", str(tmp_path / "tissue")]) == 0
    sets = open_dense_sets(f"masks:{tmp_path / 'tissue'}", "segmentation", seed=0, val_fraction=0.1)
    assert sets.class_names == script.TISSUES
    sides = [
        {int(Path(file).stem.removeprefix("slice-")) for file in source.files} for source in (sets.train, sets.held_out)
    ]
    assert sides[1] == set(range(80, 104)) and sides[0] == set(range(20, 74)) | set(range(110, 145))
    right = np.zeros(shape[:2], int)
    right[1:, 1:], right[2, 2], right[2, 3] = 1, 2, 3
    segments = sets.held_out.truth(0)["segments"]
    np.testing.assert_array_equal(segments, np.rot90(right))


def test_what_is_missing_or_there_already_is_told_in_a_line(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    assert script.main(["trees", str(tmp_path / "new")]) == 2
    assert "deepforest/data is not there: pip install --no-deps deepforest" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert script.main(["trees", str(tmp_path)]) == 2
    assert "is there already" in capsys.readouterr().err
