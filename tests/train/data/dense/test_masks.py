import pickle
import re

import numpy as np
import pytest
from PIL import Image

from convert.errors import SettingsError
from crossvit_jax.preprocess import UnreadableImage
from train.data.batches import train_batches
from train.data.dense.masks import open_masks
from train.images.dense import SegmentationEvalTransform, SegmentationTrainTransform
from train.images.geometry import IGNORED

_SETTINGS = {"ignore_index": 255, "val_fraction": 0.5, "seed": 0, "exif": "keep"}
_VALUES = np.zeros((40, 60), np.uint8)
_VALUES[:10], _VALUES[10:12], _VALUES[20:, 30:] = 1, 255, 2


@pytest.fixture
def masks(tmp_path, picture):
    """Writes a picture with its mask, an array of values or an image of Pillow's."""

    def write(name, mask=_VALUES, images="images", below="masks"):
        picture(f"{images}/{name}.jpg")
        file = tmp_path / below / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        (Image.fromarray(mask) if isinstance(mask, np.ndarray) else mask).save(file)
        return file

    (tmp_path / "classes.txt").write_text("sky\nroad\ncar\n")
    return write


def _palette(values):
    image = Image.frombytes("P", values.shape[::-1], values.tobytes())
    image.putpalette(list(range(256)) * 3)
    return image


@pytest.mark.parametrize("mask", [_VALUES, _palette(_VALUES), _VALUES.astype(np.uint16)], ids=["grey", "palette", "16"])
def test_values_and_palette_indices_are_classes(tmp_path, masks, mask):
    for name in "ab":
        masks(name, mask)
    sets = open_masks(tmp_path, **_SETTINGS)
    assert (sets.class_names, sets.kind, sets.held_out_split) == (
        ("sky", "road", "car"),
        "segmentation",
        "50% of the pictures",
    )
    sample = sets.train[0]
    assert sample["segments"].dtype == np.uint8
    np.testing.assert_array_equal(sample["segments"], _VALUES)
    assert sets.held_out.truth(0)["name"] != sample["name"]


@pytest.mark.parametrize(
    "images, below", [("images/{}", "masks/{}"), ("{}/images", "{}/masks"), ("{}/img", "{}/labels")]
)
def test_folders_of_splits(tmp_path, masks, images, below):
    for split, name in (("train", "a"), ("train", "deep/b"), ("val", "c")):
        masks(name, images=images.format(split), below=below.format(split))
    sets = open_masks(tmp_path, **_SETTINGS)
    assert (len(sets.train), len(sets.held_out), sets.held_out_split) == (2, 1, "val")
    assert [file.rpartition("/")[2] for file in sets.train.files] == ["a.jpg", "b.jpg"]


def test_colours_are_classes_where_the_file_of_classes_has_them(tmp_path, masks):
    (tmp_path / "classes.txt").write_text("sky 0 0 128\nvoid, 0, 0, 0\nroad 128 64 128\n")
    colours = np.array([[0, 0, 128], [0, 0, 0], [128, 64, 128]], np.uint8)
    places = np.where(_VALUES == 255, 1, _VALUES)
    for name in "ab":
        masks(name, colours[places])
    sets = open_masks(tmp_path, **_SETTINGS)
    assert sets.class_names == ("sky", "road")
    expected = np.array([0, IGNORED, 1])[places]
    np.testing.assert_array_equal(sets.train[0]["segments"], expected)
    masks("a", np.full((40, 60, 3), 7, np.uint8))
    told = r"masks/a.png cannot be used: it has the colour \(7, 7, 7\) at x 0, y 0, which is none of classes.txt"
    with pytest.raises(SettingsError, match=told):
        open_masks(tmp_path, **_SETTINGS)


def test_the_names_stand_for_the_values_that_are_not_ignored(tmp_path, masks):
    for name in "ab":
        masks(name, np.repeat(np.uint8([[0], [1], [2], [3], [255]]), 8, axis=0).repeat(60, axis=1))
    sets = open_masks(tmp_path, **{**_SETTINGS, "ignore_index": 0})
    assert sets.train[0]["segments"][::8, 0].tolist() == [IGNORED, 0, 1, 2, IGNORED]


def test_pictures_reach_training_with_their_masks(tmp_path, masks):
    for name in "abc":
        masks(name)
    source = pickle.loads(pickle.dumps(open_masks(tmp_path, **_SETTINGS).train))
    batches = iter(train_batches(source, SegmentationTrainTransform((60, 60)), batch_size=1, seed=0, workers=0))
    batch = next(batches)
    batches.close()
    np.testing.assert_array_equal(batch["segments"][0, :40], _VALUES)
    assert (batch["segments"][0, 40:] == IGNORED).all() and batch["bad"].tolist() == [-1]


@pytest.mark.parametrize(
    "mask, message",
    [
        (np.full((40, 60), 3, np.uint8), "mask {a} cannot be used: it has 3 at x 0, y 0, which is none of the 3 cl"),
        (np.zeros((40, 61), np.uint8), "mask {a} has 61 x 40 pixels, and its picture 60 x 40"),
        (np.zeros((40, 60, 3), np.uint8), "mask {a} cannot be used: it is in colours (RGB), and classes.txt tells no"),
    ],
)
def test_a_mask_that_does_not_fit_is_told_before_training(tmp_path, masks, mask, message):
    masks("b"), masks("c")
    file = masks("a", mask)
    with pytest.raises(SettingsError, match=re.escape(message.format(a=file))):
        open_masks(tmp_path, **_SETTINGS)


def test_pictures_that_exif_turns_fit_only_as_their_masks_were_drawn(tmp_path, masks, picture):
    masks("b"), masks("a", _VALUES.T.copy())
    picture("images/a.jpg", (60, 40), orientation=6)
    with pytest.raises(SettingsError, match=r"40 x 60 pixels, and its picture 60 x 40; .* fits with --exif apply"):
        open_masks(tmp_path, **_SETTINGS)
    picture("images/b.jpg", (40, 60), orientation=6)
    sets = open_masks(tmp_path, **_SETTINGS | {"exif": "apply"})
    for source in (sets.train, sets.held_out):
        assert SegmentationEvalTransform((60, 60), "apply")(source[0])["segments"].shape == (60, 60)


def test_masks_whose_values_were_not_kept_are_refused(tmp_path, masks):
    masks("b")
    file = masks("a").rename(tmp_path / "masks" / "a.jpg")
    Image.fromarray(_VALUES).save(file, format="JPEG")
    with pytest.raises(SettingsError, match=re.escape(f"mask {file} cannot be used: it is a JPEG file")):
        open_masks(tmp_path, **_SETTINGS)


def test_masks_of_0_and_255_are_not_taken_for_two_classes(tmp_path, masks):
    for name in "ab":
        masks(name, np.where(_VALUES == 1, 255, 0).astype(np.uint8))
    (tmp_path / "classes.txt").write_text("background\nnucleus\n")
    with pytest.raises(SettingsError, match="show only the class background beside what is ignored; where 255 stands"):
        open_masks(tmp_path, **_SETTINGS)
    (tmp_path / "classes.txt").write_text("background 0 0 0\nnucleus 255 255 255\n")
    assert open_masks(tmp_path, **_SETTINGS).train[0]["segments"].max() == 1


def test_a_mask_that_is_damaged_later_is_a_bad_image(tmp_path, masks):
    masks("a"), masks("b")
    sets = open_masks(tmp_path, **_SETTINGS)
    path = tmp_path / sets.train.masks[0]
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UnreadableImage, match=re.escape(f"cannot read image {path}")):
        sets.train[0]


@pytest.mark.parametrize(
    "classes, message",
    [
        (None, "classes.txt is needed, with the name of a class a line"),
        ("", "classes.txt is empty"),
        ("a\n\nb\n", "line 2 of {} is empty"),
        ("a\na\n", "classes.txt has the same name for two classes"),
        ("a\n", "classes.txt has 1 classes"),
        ("a 0 0 0\nb 0 0 0\n", "colours must be different, and of three numbers from 0 to 255"),
    ],
)
def test_a_file_of_classes_that_cannot_be_used(tmp_path, masks, classes, message):
    masks("a"), masks("b")
    file = tmp_path / "classes.txt"
    file.unlink() if classes is None else file.write_text(classes)
    with pytest.raises(SettingsError, match=re.escape(message.format(file))):
        open_masks(tmp_path, **_SETTINGS)


def test_pictures_without_masks_and_folders_that_are_missing(tmp_path, masks, picture):
    with pytest.raises(SettingsError, match="has no folder images/"):
        open_masks(tmp_path, **_SETTINGS)
    masks("a")
    with pytest.raises(SettingsError, match="has one picture"):
        open_masks(tmp_path, **_SETTINGS)
    masks("spare")
    (tmp_path / "images/spare.jpg").unlink()
    picture("images/b.jpg")
    with pytest.raises(SettingsError, match=r"1 of the 2 pictures in .* have no mask of their name in .*images/b\.jpg"):
        open_masks(tmp_path, **_SETTINGS)
    masks("b")
    notes = open_masks(tmp_path, **_SETTINGS).notes
    assert notes == (f"1 masks in {tmp_path / 'masks'} are left out: there is no picture of their name",)
