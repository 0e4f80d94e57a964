import io

import numpy as np
import pytest
from PIL import Image

from crossvit_jax.preprocess import normalised
from train.pictures.dense import (
    legend,
    mask_png,
    palette,
    pixels_of,
    save_sheet,
    sheet_scale,
    sheet_width,
    with_boxes,
    with_segments,
)
from train.pictures.figure import is_own_picture
from train.pictures.precision_recall import draw_precision_recall

_GREY = np.full((40, 60, 3), 128, np.uint8)


def _outlined(image, colour):
    """Left, top, right, bottom of what has exactly a colour, both ends inclusive."""
    rows, columns = np.nonzero((np.asarray(image) == colour).all(-1))
    return columns.min(), rows.min(), columns.max(), rows.max()


def test_normalised_pictures_are_shown_as_they_were():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(pixels_of(normalised(pixels)), pixels)


@pytest.mark.parametrize("scale", [1, 4])
def test_boxes_are_drawn_around_their_pixels_in_the_colour_of_their_class(scale):
    image = with_boxes(_GREY, np.array([[10.0, 20, 30, 35]]), np.array([3]), ["", "", "", "x"], scale=scale)
    assert image.size == (60 * scale, 40 * scale)
    left, _, right, bottom = _outlined(image, palette()[3])  # above, there is the label
    assert (left, right, bottom) == (10 * scale, 30 * scale - 1, 35 * scale - 1)
    assert (np.asarray(image)[30 * scale, 20 * scale] == 128).all()


def test_lines_around_small_objects_in_large_pictures_are_thin():
    large = np.full((500, 2000, 3), 128, np.uint8)
    image = np.asarray(
        with_boxes(large, np.array([[100.0, 100, 120, 120], [300, 100, 600, 400]]), np.zeros(2, int), "x")
    )
    coloured = (image == palette()[0]).all(-1)
    assert coloured[110, :200].tolist().count(True) == 2  # a pixel on either side
    assert coloured[350].tolist().count(True) == 16  # a 250th of the picture


def test_labels_stay_inside_the_picture_and_names_are_cut():
    boxes = np.array([[0.0, 0, 10, 10], [55, 35, 60, 40]])
    image = with_boxes(_GREY, boxes, np.array([0, 1]), ["x" * 99, "ü\n"], scores=np.array([0.25, 1.0]))
    assert image.size == (60, 40)
    assert with_boxes(_GREY, np.zeros((0, 4)), np.zeros(0, int), []).size == (60, 40)


def test_masks_are_laid_over_the_picture_but_for_what_counts_nowhere():
    segments = np.full((40, 60), 255, np.uint8)
    segments[:20] = 2
    image = np.asarray(with_segments(_GREY, segments))
    assert (image[20:] == 128).all()
    np.testing.assert_allclose(image[0, 0], 0.45 * 128 + 0.55 * palette()[2], atol=0.51)


def test_masks_are_written_with_their_classes_as_values():
    segments = np.random.default_rng(0).integers(0, 256, (7, 9), dtype=np.uint8)
    with Image.open(io.BytesIO(mask_png(segments))) as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(np.asarray(image), segments)
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), palette()[segments])
    few = np.zeros((3, 3), np.uint8)  # of which Pillow would make a smaller palette
    with Image.open(io.BytesIO(mask_png(few))) as image:
        np.testing.assert_array_equal(np.asarray(image), few)


def test_colours_of_classes_differ():
    assert len(np.unique(palette(), axis=0)) == 256
    assert palette()[255].tolist() == [255, 255, 255]


def test_a_sheet_holds_all_pictures_with_room_for_captions_and_legend(tmp_path):
    pictures = [Image.fromarray(np.full((40, 60, 3), shade, np.uint8)) for shade in range(60, 200, 20)]
    names = ["a", "b" * 50, "c"]
    below = legend(names, range(3), sheet_width(pictures, 3))
    path = tmp_path / "sheet.png"
    save_sheet(path, pictures, columns=3, title="t" * 500, captions=["x" * 80] * 7, below=below)
    assert is_own_picture(path)
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    for shade in range(60, 200, 20):
        assert (pixels == shade).all(-1).sum() >= 40 * 60
    assert sheet_scale(96, 96) == 3 and sheet_scale(1000, 20) == 1


def test_precision_and_recall_are_drawn_for_classes_that_have_objects(tmp_path):
    recall = np.linspace(0, 1, 101)
    curves = [(recall, 1 - recall), None, (recall, np.ones(101))] * 9
    path = tmp_path / "curves.png"
    draw_precision_recall(curves, ["a$^", "b", "c"] * 9, path, title="held out")
    assert is_own_picture(path)
    first = path.read_bytes()
    draw_precision_recall([None, *curves[1:]], ["a$^", "b", "c"] * 9, path, title="held out")
    assert path.read_bytes() != first
    draw_precision_recall([None], ["b"], path, title="nothing")
    assert is_own_picture(path)
