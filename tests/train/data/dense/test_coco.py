import json
import os
import pickle
import re

import numpy as np
import pytest

from convert.errors import SettingsError
from crossvit_jax.preprocess import UnreadableImage
from tests.train.data.dense.conftest import _with_boxes
from train.data.bad_images import BadImages
from train.data.batches import train_batches
from train.data.dense.coco import open_coco
from train.images.dense import DetectionEvalTransform, DetectionTrainTransform

_STREAM = {"seed": 0, "workers": 0}
_SETTINGS = {"val_fraction": 0.25, "seed": 0, "exif": "keep"}


def _open(path, **settings):
    return open_coco(path, **{**_SETTINGS, **settings})


def _refused(path, message, **settings):
    with pytest.raises(SettingsError, match=re.escape(message)) as raised:
        _open(path, **settings)
    assert "\n" not in str(raised.value)


def _sample(sets, name):
    """That of a picture, on whatever side it is."""
    sides = [(side, place) for side in (sets.train, sets.held_out) for place in range(len(side))]
    return next(side[place] for side, place in sides if side.files[place] == name)


def _all(sets):
    """The truths of both sides by their picture."""
    truths = [side.truth(index) for side in (sets.train, sets.held_out) for index in range(len(side))]
    return {truth["name"].rpartition("/")[2]: truth for truth in truths}


def test_a_single_file_is_split_by_pictures_and_keeps_names_and_ids(coco):
    sets = _open(coco())
    assert (len(sets.train), len(sets.held_out), sets.held_out_split) == (3, 1, "25% of the pictures")
    assert sets.class_names == ("cat", "dog", "bird")  # by their ids
    assert sets.category_ids == (3, 7, 90)
    assert sets.most_boxes == 2
    truths = _all(sets)
    assert sorted(truths) == ["a.png", "b.png", "c.png", "d.png"]
    assert [truths[name]["image_id"] for name in sorted(truths)] == [10, 11, 12, 13]
    objects = truths["a.png"]["objects"]
    assert objects.boxes.tolist() == [[5, 6, 15, 26], [0, 0, 60, 40]]
    assert (objects.classes.tolist(), objects.area.tolist()) == ([0, 2], [100, 1200])
    assert len(truths["c.png"]["objects"].boxes) == 0
    assert truths["b.png"]["size"] == (40, 60)


def test_another_seed_holds_out_other_pictures_and_has_another_fingerprint(coco):
    file = coco()
    sides = {_open(file, seed=seed).held_out.files for seed in range(8)}
    assert len(sides) > 1
    assert _open(file, seed=3).fingerprint == _open(file, seed=3).fingerprint
    assert len({_open(file, seed=seed).fingerprint for seed in range(8)}) == len(sides)
    before = _open(file, seed=3).fingerprint
    assert _open(coco(_box(5, 6, 10, 21)), seed=3).fingerprint != before


@pytest.mark.parametrize(
    "train, held_out, where, split",
    [
        ("annotations/instances_train2017.json", "annotations/instances_val2017.json", "{}2017", "val"),
        ("annotations/instances_train.json", "annotations/instances_val.json", "images/{}", "val"),
        ("train/_annotations.coco.json", "valid/_annotations.coco.json", "{}", "valid"),
    ],
)
def test_folders_of_coco_and_roboflow(tmp_path, picture, train, held_out, where, split):
    for file, name in ((train, "train"), (held_out, split)):
        picture(f"{where.format(name)}/{name}1.png")
        picture(f"{where.format(name)}/{name}2.png")
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        content = _with_boxes({f"{name}1.png": [(3, 0, 0, 9, 9)], f"{name}2.png": []})
        (tmp_path / file).write_text(json.dumps(content))
    sets = _open(tmp_path)
    assert (len(sets.train), len(sets.held_out), sets.held_out_split) == (2, 2, split)
    assert sorted(_all(sets)) == sorted(f"{name}{number}.png" for name in ("train", split) for number in (1, 2))
    assert sets.notes == ("2 of 3 classes have no box to train on: dog, bird",)


def test_pictures_reach_training_with_their_boxes(coco):
    sets = _open(coco())
    source = pickle.loads(pickle.dumps(sets.train))
    transform = DetectionTrainTransform((60, 60), most_boxes=sets.most_boxes)
    batches = iter(train_batches(source, transform, batch_size=3, **_STREAM))
    batch = next(batches)
    batches.close()
    expected = sorted(len(source.truth(index)["objects"].boxes) for index in range(3))
    assert sorted(batch["present"].sum(1).tolist()) == expected
    assert batch["image"].shape == (3, 60, 60, 3) and batch["bad"].tolist() == [-1, -1, -1]


def test_crowds_are_not_trained_on_and_need_no_place(coco):
    sets = _open(coco(lambda content: content["annotations"][1].update(iscrowd=1)))
    assert sets.most_boxes == 1
    sample = _sample(sets, "a.png")
    assert sample["objects"].crowd.tolist() == [False, True]
    given = DetectionEvalTransform((60, 60), most_boxes=1)(sample)
    assert (given["present"].tolist(), given["classes"].tolist()) == ([True], [0])


def test_roboflows_group_is_no_class(coco):
    def change(content):
        content["categories"].append({"id": 0, "name": "pets", "supercategory": "none"})
        for entry in content["categories"][:3]:
            entry["supercategory"] = "pets"

    sets = _open(coco(change))
    assert sets.class_names == ("cat", "dog", "bird")
    assert "category pets is taken for the group of the others, and no class" in sets.notes


def _box(*values, of=0):
    return lambda content: content["annotations"][of].update(bbox=list(values))


@pytest.mark.parametrize(
    "change, message",
    [
        (_box(0, 0, -5, 5), "box (0, 0, -5, 5) of a.png, 60 x 40 pixels, has a negative width or height"),
        (_box(0, float("nan"), 5, 5), "box (0, nan, 5, nan) of a.png, 60 x 40 pixels, is not made of finite numbers"),
        (_box(70, 0, 5, 5), "box (70, 0, 75, 5) of a.png, 60 x 40 pixels, lies outside of it"),
        (_box(20, 10, 50, 35), "reaches out of it, as 1 of 4 do: in another format or for other sizes?"),
        (_box(1, 2, 3), "annotation 1 of {file} has as bbox [1, 2, 3]: it needs four numbers"),
        (_box(1, 2, 3, "4"), "annotation 1 of {file} has as bbox [1, 2, 3, '4']: it needs four numbers"),
        (
            lambda content: [entry.update(bbox=[0.1, 0.2, 0.5, 0.6]) for entry in content["annotations"]],
            "and all others lie between 0 and 1: they are shares, not pixels",
        ),
        (
            lambda content: content["annotations"][0].update(iscrowd="0"),
            "annotation 1 of {file} has as iscrowd '0': it needs 0 or 1",
        ),
        (
            lambda content: content["annotations"][0].update(area="large"),
            "annotation 1 of {file} has as area 'large': it needs a number, 0 or more, or none",
        ),
        (lambda content: content["annotations"][0].update(area=-1), "annotation 1 of {file} has as area -1: it needs"),
        (
            lambda content: content["images"][1].update(width=80),
            "{file} tells 80 x 40 pixels of {folder}/b.png, which has 60 x 40",
        ),
        (
            lambda content: content["images"][1].update(file_name="gone.png"),
            "1 of the 4 pictures in {file} are missing: {folder}/gone.png",
        ),
        (lambda content: content["images"][1].update(file_name="a.png"), "{file} names pictures twice: a.png"),
        (lambda content: content["images"][1].update(id=10), "{file} has more than one image of the id 10"),
        (lambda content: content["images"][1].update(id="x"), "{file}: id must be a whole number; got 'x'"),
        (
            lambda content: content["categories"][0].update(id=3),
            "{file} has more than one category of the id 3",
        ),
        (
            lambda content: content["categories"][0].update(name="cat"),
            "{file} has more than one category of the name 'cat'",
        ),
        (
            lambda content: content["annotations"][2].update(image_id=99),
            "annotation 3 of {file} is for image 99, and there is none of this id",
        ),
        (
            lambda content: content["annotations"][2].update(category_id=4),
            "annotation 3 of {file} is of category 4, and there is none of this id",
        ),
        (lambda content: content.update(annotations=[]), "none of the 4 pictures in {file} has a box"),
        (
            lambda content: [entry.update(iscrowd=1) for entry in content["annotations"]],
            "none of the 4 pictures in {file} has a box, only crowds",
        ),
        (lambda content: content.pop("categories"), "{file} is no file of COCO's objects"),
        (lambda content: content.update(images=[], annotations=[]), "{file} names no pictures"),
    ],
)
def test_what_does_not_fit_together_is_told_before_training(coco, tmp_path, change, message):
    file = coco(change)
    _refused(file, message.format(file=file, folder=tmp_path))


def test_more_boxes_than_a_batch_has_room_for_are_told_with_their_picture(coco):
    def crowd(content):
        content["annotations"] += [content["annotations"][0] | {"id": 10 + number} for number in range(20_000)]

    with pytest.raises(SettingsError, match=r"all\.json: a\.png has 20,002 boxes, .*; there can be 20,000"):
        _open(coco(crowd))


def test_boxes_without_area_are_left_out_and_told(coco):
    sets = _open(coco(_box(5, 6, 0, 20)))
    assert len(_all(sets)["a.png"]["objects"].boxes) == 1
    (note,) = (note for note in sets.notes if "area" in note)
    assert note.startswith("left out, as they have no area: 1 of 4 boxes; ")
    assert note.endswith("box (5, 6, 5, 26) of a.png, 60 x 40 pixels")


def test_few_boxes_that_reach_out_of_their_picture_are_cut_and_told(coco):
    def change(content):
        first = content["annotations"][0]
        content["annotations"] += [dict(first, id=100 + number) for number in range(20)]
        first["bbox"] = [50, 30, 20, 8]
        content["annotations"][1]["bbox"] = [0, 0, 60.7, 40.2]  # rounding: not worth a word

    sets = _open(coco(change))
    objects = _all(sets)["a.png"]["objects"]
    assert objects.boxes[:2].tolist() == [[50, 30, 60, 38], [0, 0, 60, 40]]
    assert any(note.startswith("cut to their picture: 1 of 24 boxes; ") for note in sets.notes)


def test_annotations_of_the_same_id_are_all_taken_and_told(coco):
    sets = _open(coco(lambda content: content["annotations"][1].update(id=1)))
    assert len(_all(sets)["a.png"]["objects"].boxes) == 2
    assert any("1 annotations have the id of another one" in note for note in sets.notes)


def test_pictures_that_exif_turns_fit_only_as_their_boxes_were_drawn(coco, picture):
    def change(content):
        picture("b.png", size=(40, 60), orientation=6)

    file = coco(change)
    told = f"tells 60 x 40 pixels of {file.parent}/b.png, which has 40 x 60; it carries an EXIF orientation, and its"
    _refused(file, f"{told} boxes fit with --exif apply")
    sets = _open(file, exif="apply")
    given = DetectionEvalTransform((60, 60), exif="apply", most_boxes=2)(_sample(sets, "b.png"))
    np.testing.assert_allclose(given["boxes"][0], [1, 2, 4, 6])


def test_a_picture_that_vanishes_later_is_a_bad_image(coco):
    sets = _open(coco())
    os.remove(sets.train.paths()[0])
    with pytest.raises(UnreadableImage, match="No such file"):
        sets.train[0]


def test_a_picture_that_is_replaced_by_one_of_another_size_is_a_bad_image_and_told_as_such(coco, picture):
    sets, lines = _open(coco()), []
    picture(sets.train.files[0], size=(30, 20))
    bad = BadImages(sets.train, lines.append)
    batches = iter(train_batches(sets.train, DetectionTrainTransform((60, 60), most_boxes=2), batch_size=3, **_STREAM))
    bad.add(next(batches)["bad"])
    batches.close()
    name = sets.train.paths()[0]
    assert lines == [f"cannot read image {name}: it has 30 x 20 pixels, and its boxes are for 60 x 40"]


def test_classes_keep_the_order_of_their_data_set(coco):
    sets = _open(coco())
    assert sets.in_order(["cat", "dog", "bird"]) is sets
    with pytest.raises(SettingsError, match="in the order of their data set"):
        sets.in_order(["bird", "cat", "dog"])


@pytest.mark.parametrize(
    "path, message",
    [("nowhere", "there is no file or folder"), ("empty", "has neither annotations/instances_train*.json nor")],
)
def test_places_without_annotations(tmp_path, path, message):
    (tmp_path / "empty").mkdir()
    _refused(tmp_path / path, message)


def test_a_file_that_is_no_json(tmp_path):
    (tmp_path / "x.json").write_text("{,")
    _refused(tmp_path / "x.json", "x.json is no JSON: Expecting property name")


def test_sides_with_other_categories(tmp_path, picture):
    for split, name in (("train", "cat"), ("val", "lion")):
        picture(f"{split}/a.png")
        content = _with_boxes({"a.png": [(3, 0, 0, 9, 9)]})
        content["categories"][1]["name"] = name
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    _refused(tmp_path, "have different categories: (3, 'cat'), (3, 'lion')")
