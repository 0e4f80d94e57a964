import io
import pickle

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from convert.errors import SettingsError
from tests.train.data.tiny_set import prepare_tiny
from train.data.dense.open import open_dense_sets
from train.images.dense import DetectionEvalTransform, SegmentationEvalTransform


def _png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    file.seek(0)
    return file


def _mask(i):
    values = np.full((20, 30), 1, np.uint8)
    values[: i + 1] = 3
    values[-1] = 255
    return values


_FEATURES = tfds.features
_IMAGE = _FEATURES.Image(shape=(None, None, 3), encoding_format="png")
_OBJECTS = {
    "bbox": _FEATURES.BBoxFeature(),
    "label": _FEATURES.ClassLabel(names=["cat", "dog"]),
    "pose": _FEATURES.ClassLabel(names=["left", "right"]),
    "is_crowd": np.bool_,
}


def _example(i):
    box = _FEATURES.BBox(ymin=0.1, xmin=0.2, ymax=0.5, xmax=1.0)
    whole = {"bbox": _FEATURES.BBox(0.0, 0.0, 1.0, 1.0), "label": 0, "pose": 0, "is_crowd": True}
    objects = [{"bbox": box, "label": 1, "pose": 0, "is_crowd": False}] * i + [whole] * (i > 0)
    return {"image": _png(np.full((20, 30, 3), i, np.uint8)), "objects": objects}


@pytest.fixture
def prepared(tmp_path):
    """Prepares a set `tiny` and opens it for a task."""

    def open_it(kind, features, example, splits=(("train", 4), ("test", 3))):
        prepare_tiny(tmp_path, features, example, dict(splits))
        return open_dense_sets("tiny", kind, seed=0, val_fraction=0.5, data_dir=str(tmp_path))

    return open_it


def _count(sample):
    """By which the example was made."""
    return int(np.asarray(Image.open(io.BytesIO(sample["image"])))[0, 0, 0])


@pytest.mark.parametrize("splits", [(("train", 4), ("test", 3)), (("train", 4),)], ids=["both", "train only"])
def test_shares_become_pixels_and_crowds_are_told(prepared, splits):
    sets = prepared("detection", {"image": _IMAGE, "objects": _FEATURES.Sequence(_OBJECTS)}, _example, splits)
    assert (sets.class_names, sets.most_boxes) == (("cat", "dog"), 3)
    source = pickle.loads(pickle.dumps(sets.train))
    assert len(source) + len(sets.held_out) == sum(count for _, count in splits)
    for index in range(len(source)):
        sample = source[index]
        count = _count(sample)
        assert sample["size"] == (20, 30)
        assert sample["objects"].crowd.tolist() == [False] * count + [True] * (count > 0)
        np.testing.assert_allclose(sample["objects"].boxes[:count], np.tile([6, 2, 30, 10], (count, 1)), rtol=1e-6)
        assert sample["objects"].classes.tolist() == [1] * count + [0] * (count > 0)
        assert DetectionEvalTransform((30, 30), most_boxes=3)(sample)["present"].sum() == count
        truth = source.truth(index)
        assert truth["name"] == sample["name"] == f"{truth['image_id']} of split train"
        np.testing.assert_array_equal(truth["objects"].boxes, sample["objects"].boxes)


@pytest.mark.parametrize("named", [True, False])
def test_masks_have_the_classes_that_are_named_or_those_that_are_seen(prepared, named):
    mask = (
        _FEATURES.LabeledImage(shape=(None, None, 1), labels=["sky", "road", "tree", "car"])
        if named
        else _FEATURES.Image(shape=(None, None, 1), encoding_format="png")
    )
    features = {"image": _IMAGE, "segmentation_mask": mask}
    sets = prepared(
        "segmentation", features, lambda i: {"image": _example(i)["image"], "segmentation_mask": _png(_mask(i))}
    )
    names, expected = (("sky", "road", "tree", "car"), {1: 1, 3: 3}) if named else (("1", "3"), {1: 0, 3: 1})
    assert sets.class_names == names
    source = pickle.loads(pickle.dumps(sets.train))
    for index in range(len(source)):
        segments = source[index]["segments"]
        values = _mask(_count(source[index]))
        for value, label in {**expected, 255: 255}.items():
            assert (segments[values == value] == label).all()
        np.testing.assert_array_equal(source.truth(index)["segments"], segments)
    assert SegmentationEvalTransform((30, 30))(source[0])["segments"].shape == (30, 30)


@pytest.mark.parametrize("kind, message", [("detection", "tiny has no boxes"), ("segmentation", "tiny has no masks")])
def test_a_set_without_them_is_refused_with_what_it_has(prepared, kind, message):
    with pytest.raises(SettingsError, match=f"{message}: .*; it has image, note"):
        features = {"image": _IMAGE, "note": _FEATURES.Text()}
        prepared(kind, features, lambda i: {"image": _example(i)["image"], "note": "x"})
