"""The transforms of pictures with boxes or masks."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import v2

from crossvit_jax.preprocess import UnreadableImage, normalised
from train.images.colour import ColourJitter, draw_colour, jitter_colour
from train.images.dense import (
    Boxes,
    DetectionEvalTransform,
    DetectionTrainTransform,
    SegmentationEvalTransform,
    SegmentationTrainTransform,
)
from train.images.geometry import IGNORED, place_boxes, place_pixels, whole_placement


def _boxes(boxes, crowd=None):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    crowd = np.zeros(len(boxes), bool) if crowd is None else np.array(crowd)
    return Boxes(boxes, np.arange(len(boxes), dtype=np.int32), crowd, np.prod(boxes[:, 2:] - boxes[:, :2], axis=1))


@pytest.fixture
def sample(photo):
    """Of 130 × 90 pixels: three objects, the second one a crowd."""
    objects = _boxes([[10, 10, 50, 40], [0, 0, 130, 90], [100, 50, 130, 90]], [False, True, False])
    return {"image": photo, "name": "photo", "objects": objects, "size": (90, 130)}


@pytest.fixture
def masked(photo):
    segments = np.random.default_rng(0).integers(0, 5, (90, 130), dtype=np.uint8)
    return {"image": photo, "name": "photo", "segments": segments}


def test_evaluation_gives_the_whole_picture_and_all_its_objects_but_crowds(sample):
    given = DetectionEvalTransform((48, 48), most_boxes=4)(sample)
    placement = whole_placement((90, 130), (48, 48))
    pixels = np.array(Image.open(io.BytesIO(sample["image"])))
    np.testing.assert_array_equal(given["image"], place_pixels(pixels, placement))
    assert given["present"].tolist() == [True, True, False, False]
    assert given["classes"].tolist() == [0, 2, 0, 0]
    np.testing.assert_array_equal(given["boxes"][:2], place_boxes(sample["objects"].boxes[[0, 2]], placement)[0])
    assert not given["boxes"][2:].any()
    assert {name: array.dtype for name, array in given.items()} == {
        "image": np.uint8,
        "boxes": np.float32,
        "classes": np.int32,
        "present": bool,
    }


def test_training_without_augmentation_gives_what_evaluation_gives(sample, masked):
    rng = np.random.default_rng(0)
    for train, evaluation, picture in (
        (DetectionTrainTransform((48, 96), most_boxes=3), DetectionEvalTransform((48, 96), most_boxes=3), sample),
        (SegmentationTrainTransform((48, 96)), SegmentationEvalTransform((48, 96)), masked),
    ):
        one, other = train(picture, rng), evaluation(picture)
        assert one.keys() == other.keys()
        other["image"] = normalised(other["image"])  # which the devices do in evaluation
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_augmentation_follows_the_generator_of_the_sample_and_moves_the_boxes_with_the_pixels(photo):
    bright = np.zeros((90, 130, 3), np.uint8)
    bright[20:60, 30:90] = 255
    file = io.BytesIO()
    Image.fromarray(bright).save(file, format="PNG")
    objects = _boxes([[30, 20, 90, 60]])
    sample = {"image": file.getvalue(), "name": "bright", "objects": objects, "size": (90, 130)}
    transform = DetectionTrainTransform((96, 96), scale_jitter=(0.5, 1.5), hflip=0.5, most_boxes=1)
    seen = set()
    for seed in range(20):
        given = transform(sample, np.random.default_rng(seed))
        again = transform(sample, np.random.default_rng(seed))
        np.testing.assert_array_equal(given["image"], again["image"])
        if not given["present"][0]:
            continue
        rows, columns = (np.flatnonzero((given["image"] > 2).all(-1).any(axis)) for axis in (1, 0))
        found = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        np.testing.assert_allclose(given["boxes"][0], found, atol=1.0)
        seen.add(found)
    assert len(seen) > 10


def test_masks_move_with_the_pixels(masked):
    levels = masked["segments"] * 50
    file = io.BytesIO()
    Image.fromarray(np.repeat(levels[..., None], 3, -1)).save(file, format="PNG")
    transform = SegmentationTrainTransform((96, 160), scale_jitter=(90 / 96, 90 / 96), hflip=1.0)  # no resizing
    given = transform({**masked, "image": file.getvalue()}, np.random.default_rng(0))
    assert given["segments"].dtype == np.uint8
    np.testing.assert_array_equal(given["segments"][:90, :130], masked["segments"][:, ::-1])
    expected = normalised(np.repeat(levels[:, ::-1, None], 3, -1))
    np.testing.assert_array_equal(given["image"][:90, :130], expected)
    assert (given["segments"][90:] == IGNORED).all() and (given["segments"][:, 130:] == IGNORED).all()


def test_blanks_have_the_shapes_of_samples_and_nothing_to_find(sample, masked):
    for transform, picture in (
        (DetectionEvalTransform((48, 48), most_boxes=3), sample),
        (SegmentationEvalTransform((48, 48)), masked),
    ):
        blank, given = transform.blank(), transform(picture)
        assert {name: (array.shape, array.dtype) for name, array in blank.items()} == {
            name: (array.shape, array.dtype) for name, array in given.items()
        }
        assert not blank["image"].any()
        assert not blank.get("present", np.zeros(1)).any()
        assert (blank.get("segments", np.array(IGNORED)) == IGNORED).all()


def test_boxes_are_never_cut_off_for_want_of_places(sample):
    with pytest.raises(ValueError, match="2 boxes do not fit into 1 places"):
        DetectionEvalTransform((48, 48), most_boxes=1)(sample)


def test_a_picture_of_another_size_than_its_boxes_or_mask_cannot_be_used(sample, masked):
    with pytest.raises(UnreadableImage, match="photo: it has 130 x 90 pixels, and its boxes are for 90 x 130"):
        DetectionEvalTransform((48, 48), most_boxes=3)(sample | {"size": (130, 90)})
    with pytest.raises(UnreadableImage, match="photo: it has 130 x 90 pixels, and its mask is 90 x 130"):
        SegmentationEvalTransform((48, 48))(masked | {"segments": masked["segments"].T})


def test_transforms_can_be_sent_to_workers(sample):
    for transform in (DetectionEvalTransform((48, 48), most_boxes=3), SegmentationTrainTransform((48, 48), hflip=0.5)):
        assert pickle.loads(pickle.dumps(transform)) == transform


@pytest.mark.parametrize("place, adjust", [(0, "brightness"), (1, "contrast"), (2, "saturation")])
def test_colours_change_as_in_torchvision(place, adjust, photographs):
    for factor in (0.0, 0.4, 1.3):
        factors = [1.0, 1.0, 1.0]
        factors[place] = factor
        jittered = jitter_colour(np.asarray(photographs[0]), ColourJitter(tuple(factors), (2, 0, 1)))
        expected = getattr(v2.functional, f"adjust_{adjust}")(photographs[0], factor)
        np.testing.assert_array_equal(jittered, np.asarray(expected))


def test_colour_factors_are_drawn_around_one():
    drawn = [draw_colour(np.random.default_rng(seed), 0.4) for seed in range(1000)]
    factors = np.array([jitter.factors for jitter in drawn])
    assert factors.min() >= 0.6 and factors.max() <= 1.4
    np.testing.assert_allclose(factors.mean(0), 1, atol=0.03)
    assert len({jitter.order for jitter in drawn}) == 6


def test_each_sample_is_jittered_in_its_own_way(photo):
    segments = np.zeros((90, 130), np.uint8)
    transform = SegmentationTrainTransform((48, 48), (0.5, 2.0), hflip=0.5, color_jitter=0.4)
    images = [transform({"image": photo, "name": "", "segments": segments}, np.random.default_rng(n))["image"]
              for n in range(3)]  # fmt: skip
    assert len({image.tobytes() for image in images}) == 3
