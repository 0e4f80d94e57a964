"""Detection as a task: its loss, its scores, and data sets whose classes are others than the model's."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from convert.errors import SettingsError
from tests.train.tasks.dense_models import make_batch, make_model, make_task
from train.data.dense.samples import DenseSets
from train.images.geometry import Boxes
from train.tasks.begin import matched


def test_rows_without_a_box_count_nowhere_whatever_they_hold():
    task = make_task("detection")
    model = make_model(task)
    graphdef, params = nnx.split(model)

    @jax.jit
    @jax.value_and_grad
    def loss(params, batch):
        batch = task.prepare(batch, jax.random.key(0))
        return task.loss(nnx.merge(graphdef, params), batch, None, rngs=nnx.Rngs(0))[0]

    batch = make_batch("detection")
    absent = ~batch["present"]
    assert absent[-1].all() and absent[3].any() and not absent[3].all()  # an image without a box, one with a few
    expected, gradient = loss(params, batch)
    junk = jnp.where(absent[..., None], jnp.array([5.0, 5.0, 40.0, 40.0]), batch["boxes"])
    other, other_gradient = loss(params, batch | {"boxes": junk, "classes": jnp.where(absent, 2, batch["classes"])})
    assert np.isfinite(expected) and other == expected
    for one, two in zip(*map(jax.tree.leaves, (gradient, other_gradient)), strict=True):
        assert np.isfinite(one).all() and np.abs(one).max() > 0
        np.testing.assert_array_equal(one, two)
    nothing = loss(params, batch | {"present": jnp.zeros_like(absent)})
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(nothing))


class _Pictures:
    """Three pictures of 192 x 96 pixels with an object of each class, of which the model's canvas sees a quarter."""

    endless = False
    boxes = np.array([[8, 4, 48, 44], [60, 20, 120, 80], [130, 10, 180, 90]], np.float32)

    def __len__(self):
        return 3

    def __getitem__(self, index):
        raise AssertionError("the picture itself is not needed")

    def truth(self, index):
        objects = Boxes(self.boxes, np.arange(3, dtype=np.int32), np.zeros(3, bool), np.full(3, 2000.0))
        return {"name": f"{index}", "image_id": 100 + index, "size": (96, 192), "objects": objects}


def _outputs(rows, mask=(1, 1, 1)):
    """What the devices tell of three images: for each a list of (class, score, box on the canvas)."""
    found = {
        "boxes": np.zeros((3, 5, 4), np.float32),
        "scores": np.zeros((3, 5), np.float32),
        "labels": np.zeros((3, 5), np.int32),
        "valid": np.zeros((3, 5), bool),
    }
    for row, objects in enumerate(rows):
        for place, (label, score, box) in enumerate(objects):
            for name, value in {"boxes": box, "scores": score, "labels": label, "valid": True}.items():
                found[name][row, place] = value
    return found | {"mask": np.array(mask, np.float32), "sums": {"loss": np.float32(6), "positives": np.int32(4)}}


_RIGHT = [(label, 0.9 - label / 10, box / 4) for label, box in enumerate(_Pictures.boxes)]


def _scores(rows, mask=(1, 1, 1), task=None, source=None):
    task = task or make_task("detection")
    scores = task.scores(source or _Pictures())
    scores.add(_outputs(rows, mask))
    return scores


def test_boxes_are_scored_in_the_pictures_own_pixels():
    values = _scores([_RIGHT] * 3).values()
    assert (values["ap"], values["ap50"], values["ar100"]) == pytest.approx((1, 1, 1))
    assert (values["loss"], values["images"]) == (1.5, 3)


def test_a_wrong_class_and_a_missing_object_are_what_the_figures_say():
    wrong = [(1, 0.9, _RIGHT[0][2]), _RIGHT[1]]  # the first object is taken for the second's class, the third is missed
    scores = _scores([wrong] * 3)
    by_hand = [0, 1 / 2, 0]  # of class 1, each right box comes after a wrong one that is surer
    assert scores.values()["ap50"] == pytest.approx(np.mean(by_hand), abs=0.01)
    assert scores.values()["ar100"] == pytest.approx(1 / 3)


def test_an_unreadable_picture_is_left_out_and_the_others_keep_their_places(tmp_path):
    scores = _scores([_RIGHT, [(0, 0.99, np.array([0, 0, 9, 9.0]))], _RIGHT], mask=(1, 0, 1))
    values = scores.values()
    assert (values["ap"], values["images"]) == pytest.approx((1, 2))
    about = {"weights": "w", "dataset": "d", "split": "s"}
    written = scores.write(tmp_path, about=about, images=["0", "1", "2"])
    assert written == ["evaluation.json", "per_class.csv", "detections.json", "precision.png"]
    results = json.loads((tmp_path / "detections.json").read_text())
    assert [(entry["image_id"], entry["category_id"]) for entry in results[::3]] == [(100, 7), (102, 7)]
    assert results[1] == {"image_id": 100, "category_id": 3, "bbox": [60, 20, 60, 60], "score": 0.8}
    rows = (tmp_path / "per_class.csv").read_text().splitlines()
    assert rows[:2] == ["class,objects,ap,ap50,ap75,ar100", "a,2,1,1,1,1"]
    with Image.open(tmp_path / "precision.png") as picture:
        assert picture.size[0] > 100
    scores.check_place(tmp_path)  # which may be written again


def test_an_evaluation_of_pictures_without_objects_has_no_ap_and_can_be_replaced(tmp_path):
    class Empty(_Pictures):
        def truth(self, index):
            nothing = Boxes(np.zeros((0, 4), np.float32), np.zeros(0, np.int32), np.zeros(0, bool), np.zeros(0))
            return {**super().truth(index), "objects": nothing}

    scores = _scores([_RIGHT, [], []], source=Empty())
    assert "ap" not in scores.values() and scores.values()["images"] == 3
    about = {"weights": "w", "dataset": "d", "split": "s"}
    scores.write(tmp_path, about=about, images=["0", "1", "2"])
    assert json.loads((tmp_path / "evaluation.json").read_text())["ap"] is None
    scores.check_place(tmp_path)


def _sets(names, category_ids):
    return DenseSets(
        _Pictures(), _Pictures(), names, "val", "print", kind="detection", most_boxes=9, category_ids=category_ids
    )


def test_classes_in_another_order_are_matched_by_name_with_the_ids_of_the_data_set():
    # the data set's classes 0, 1, 2 are the model's 2, 0, 1
    task, source, notes = matched(
        make_task("detection"), ("b", "c", "a"), sets := _sets(tuple("abc"), (7, 3, 90)), sets.train
    )
    assert (task.class_names, task.category_ids, task.most_boxes) == (tuple("bca"), (3, 90, 7), 9)
    assert source.truth(0)["objects"].classes.tolist() == [2, 0, 1]
    assert notes == ["the data set has the weights' classes in another order: they are matched by name"]
    rows = [[(place, score, box) for place, (_, score, box) in zip((2, 0, 1), _RIGHT, strict=True)]] * 3
    assert _scores(rows, task=task, source=source).values()["ap"] == pytest.approx(1)


def test_classes_that_the_data_set_lacks_have_no_id_and_are_no_result(tmp_path):
    task = dataclasses.replace(
        make_task("detection"), model_config=make_task("detection").model_config.replace(num_classes=4)
    )
    task, source, notes = matched(task, tuple("xabc"), sets := _sets(tuple("abc"), (7, 3, 90)), sets.held_out)
    assert task.category_ids == (None, 7, 3, 90)
    assert notes == ["the data set has 3 of the 4 classes of the weights: to predict one of the others is wrong"]
    scores = _scores([[(0, 0.9, _RIGHT[0][2]), (1, 0.8, _RIGHT[0][2])]] * 3, task=task, source=source)
    scores.write(tmp_path, about={"weights": "w", "dataset": "d", "split": "s"}, images=["0"] * 3)
    found = json.loads((tmp_path / "detections.json").read_text())
    assert [entry["category_id"] for entry in found] == [7, 7, 7]


def test_classes_that_the_model_does_not_know_are_refused():
    with pytest.raises(SettingsError, match="only in the data set: a"):
        matched(make_task("detection"), ("x", "b", "c"), sets := _sets(tuple("abc"), (1, 2, 3)), sets.train)


def test_classes_that_are_not_wanted_take_no_place_among_the_detections():
    task = dataclasses.replace(make_task("detection"), score_threshold=0.0, max_detections=400)
    model, images = make_model(task), make_batch("detection")["image"]
    few = dataclasses.replace(task, max_detections=5, wanted=(2,))
    every, some = (jax.device_get(jax.jit(partial(t.found, model))(images)) for t in (task, few))
    for row in range(len(images)):
        of_class = every["valid"][row] & (every["labels"][row] == 2)
        assert some["valid"][row].all() and (some["labels"][row] == 2).all()
        np.testing.assert_allclose(some["scores"][row], every["scores"][row][of_class][:5], rtol=1e-6)
