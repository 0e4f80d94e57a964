"""Segmentation as a task: its loss, its scores, and data sets whose classes are others than the model's."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from tests.train.tasks.dense_models import SIDE, make_batch, make_model, make_task
from train.data.dense.samples import DenseSets
from train.inference.model import forward
from train.tasks.begin import matched
from train.tasks.task import LATER


def _loss(task, batch):
    model = make_model(task)
    batch = task.prepare(batch, jax.random.key(0))
    return float(task.loss(model, batch, None, rngs=nnx.Rngs(0))[0])


def test_dice_is_added_with_its_weight():
    batch = make_batch("segmentation")
    plain, half, one = (_loss(make_task("segmentation", dice=weight), batch) for weight in (0.0, 0.5, 1.0))
    assert one - plain == pytest.approx(2 * (half - plain), rel=1e-4)
    assert 0.2 < one - plain < 1


def test_pixels_of_no_class_count_nowhere_even_where_there_are_no_others():
    task, batch = make_task("segmentation", dice=1.0), make_batch("segmentation")
    whole = {**batch, "segments": jnp.full_like(batch["segments"], 255).at[0].set(1)}
    alone = {name: array[:1] for name, array in whole.items()}
    assert _loss(task, whole) == pytest.approx(_loss(task, alone), rel=1e-5)
    assert _loss(task, {**batch, "segments": jnp.full_like(batch["segments"], 255)}) == 0


class _Pictures:
    """Two pictures of 96 x 24 pixels, of which the canvas sees the half; the last row counts nowhere."""

    endless = False

    def __len__(self):
        return 2

    def truth(self, index):
        segments = np.zeros((24, 96), np.uint8)
        segments[:, 48:] = 1 + index
        segments[-1] = 255
        return {"name": f"{index}", "image_id": index, "segments": segments}


def _outputs(left_and_right, mask=(1, 1)):
    """Of each image a class for the left and the right half of the picture; below, the canvas has the third class."""
    logits = np.zeros((2, SIDE, SIDE, 4), np.float32)
    logits[:, 12:, :, 3] = 9
    for row, (left, right) in enumerate(left_and_right):
        logits[row, :12, :24, left] = logits[row, :12, 24:, right] = 5
    sums = {"loss": np.float32(60), "pixels": np.int32(40)}
    classes = logits.argmax(-1).astype(np.uint8)
    return {"classes": classes, "mask": np.array(mask, np.float32), "sums": sums, LATER: jnp.asarray(logits)}


def _scores(halves, mask=(1, 1), task=None, source=None):
    scores = (task or make_task("segmentation")).scores(source or _Pictures())
    scores.add(_outputs(halves, mask))
    return scores


def test_classes_are_scored_at_the_pictures_own_size():
    scores = _scores([(0, 1), (0, 2)])
    assert scores.confusion.tolist() == np.diag([2 * 23 * 48, 23 * 48, 23 * 48, 0]).tolist()
    assert scores.values() == {"images": 2, "loss": 1.5, "miou": 1.0, "macc": 1.0, "aacc": 1.0}


def test_logits_are_asked_for_where_a_picture_has_another_size_than_the_model_alone():
    task, batch = make_task("segmentation"), make_batch("segmentation")
    batch |= {"mask": jnp.ones(8)}
    (outputs,) = forward(jax.jit(lambda batch: task.evaluate(make_model(task), batch)), iter([batch]))
    assert isinstance(outputs[LATER], jax.Array) and isinstance(outputs["classes"], np.ndarray)
    np.testing.assert_array_equal(outputs["classes"], np.asarray(outputs[LATER]).argmax(-1))

    class Canvases(_Pictures):
        def truth(self, index):
            return {"segments": np.asarray(batch["segments"][index])}

    scores = task.scores(Canvases())
    scores.add({name: value for name, value in outputs.items() if name != LATER})
    true, taken = np.asarray(batch["segments"]), outputs["classes"]
    expected = [[int(((true == row) & (taken == column)).sum()) for column in range(4)] for row in range(4)]
    assert scores.confusion.tolist() == expected and scores.values()["images"] == 8
    with pytest.raises(KeyError, match=LATER):
        task.scores(_Pictures()).add({name: value for name, value in outputs.items() if name != LATER})


def test_what_is_taken_for_another_class_is_what_the_figures_say():
    scores = _scores([(0, 1), (0, 1)])  # all of class 2 is taken for class 1
    values = scores.values()
    assert values["miou"] == pytest.approx((1 + 1 / 2 + 0) / 3)  # the fourth class is nowhere
    assert values["macc"] == pytest.approx(2 / 3) and values["aacc"] == pytest.approx(3 / 4)


def test_an_unreadable_picture_is_left_out_and_the_others_keep_their_places(tmp_path):
    scores = _scores([(3, 3), (0, 2)], mask=(0, 1))
    assert (scores.values()["miou"], scores.values()["images"]) == (1, 1)
    about = {"weights": "w", "dataset": "d", "split": "s"}
    written = scores.write(tmp_path, about=about, images=["0", "1"])
    assert written == ["evaluation.json", "per_class.csv", "confusion.csv", "confusion.png"]
    rows = (tmp_path / "per_class.csv").read_text().splitlines()
    assert rows == ["class,pixels,iou,acc", "a,1104,1.0000,1.0000", "b,0,,", "c,1104,1.0000,1.0000", "d,0,,"]
    with Image.open(tmp_path / "confusion.png") as picture:
        assert picture.size[0] > 100
    scores.check_place(tmp_path)


def test_an_evaluation_in_which_no_pixel_counts_has_no_figures_and_can_be_replaced(tmp_path):
    class Nothing(_Pictures):
        def truth(self, index):
            return {**super().truth(index), "segments": np.full((24, 96), 255, np.uint8)}

    scores = _scores([(0, 1), (0, 2)], source=Nothing())
    assert "miou" not in scores.values()
    about = {"weights": "w", "dataset": "d", "split": "s"}
    scores.write(tmp_path, about=about, images=["0", "1"])
    assert json.loads((tmp_path / "evaluation.json").read_text())["miou"] is None
    scores.check_place(tmp_path)


@pytest.mark.parametrize("known, places", [("cabd", [1, 2, 0]), ("dcba", [3, 2, 1])])
def test_classes_in_another_order_or_fewer_are_matched_by_name(known, places):
    sets = DenseSets(_Pictures(), _Pictures(), tuple("abc"), "val", "print", kind="segmentation")
    task, source, notes = matched(make_task("segmentation"), tuple(known), sets, sets.train)
    assert task.class_names == tuple(known)
    assert any("3 of the 4 classes of the weights" in note for note in notes)
    a, b, c = places
    true = source.truth(1)["segments"]
    assert (true[0, 0], true[0, -1], true[-1, 0]) == (a, c, 255)
    halves = [(a, b), (a, c)]
    confusion = _scores(halves, task=task, source=source).confusion
    assert np.trace(confusion) == confusion.sum() == 2 * 23 * 96
