import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from crossvit_jax.preprocess import MEAN
from train.images.geometry import (
    IGNORED,
    LEAST_SIDE,
    LEAST_VISIBLE,
    Placement,
    boxes_in_picture,
    classes_in_picture,
    draw_placement,
    logits_in_picture,
    place_boxes,
    place_pixels,
    place_segments,
    whole_placement,
)

_PADDING = tuple(round(255 * mean) for mean in MEAN)

# (size, canvas, scale jitter): pictures larger and smaller than the canvas, wide and tall, one and many windows of them
_CASES = [
    ((90, 130), (96, 96), (0.3, 2.0)),
    ((130, 90), (96, 96), (1.2, 2.0)),
    ((31, 200), (48, 96), (0.1, 2.0)),
    ((40, 40), (96, 96), (1.0, 1.0)),
    ((96, 96), (96, 96), (1.0, 1.0)),
]


def _picture(size, seed=0):
    """Pixels, masks with all kinds of classes, and boxes, some at the border."""
    rng = np.random.default_rng(seed)
    height, width = size
    coarse = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    pixels = np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    segments = rng.integers(0, 150, size, dtype=np.uint8)
    corners = np.sort(rng.uniform(size=(40, 2, 2)), axis=1) * (width, height)
    return pixels, segments, corners.reshape(40, 4).astype(np.float32)


def _by_torchvision(pixels, segments, boxes, placement):
    """What torchvision makes of all three when it is told the same."""
    height, width = placement.size
    joint = (
        Image.fromarray(pixels),
        tv_tensors.Mask(torch.from_numpy(segments)),
        tv_tensors.BoundingBoxes(torch.from_numpy(boxes), format="XYXY", canvas_size=(height, width)),
    )
    rows, columns = placement.covered
    functional = v2.functional
    results = []
    for part in joint:
        part = functional.resize(part, list(placement.resized), interpolation=v2.InterpolationMode.BICUBIC)
        part = functional.horizontal_flip(part) if placement.mirrored else part
        part = functional.vertical_flip(part) if placement.upside_down else part
        part = functional.crop(part, placement.top, placement.left, rows, columns)
        fill = _PADDING if isinstance(part, Image.Image) else IGNORED
        below, right = placement.canvas[0] - rows, placement.canvas[1] - columns
        results.append(functional.pad(part, [0, 0, right, below], fill=fill))
    return [np.asarray(part) for part in results]


@pytest.mark.parametrize("size, canvas, jitter", _CASES)
def test_pixels_masks_and_boxes_move_together_as_torchvision_moves_them(size, canvas, jitter):
    picture = _picture(size)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        placement = draw_placement(rng, size, canvas, scale_jitter=jitter, hflip=0.5, vflip=0.5)
        pixels, segments, boxes = _by_torchvision(*picture, placement)
        np.testing.assert_array_equal(place_pixels(picture[0], placement), pixels)
        np.testing.assert_array_equal(place_segments(picture[1], placement), segments)
        placed, kept = place_boxes(picture[2], placement)
        np.testing.assert_allclose(placed[kept], boxes[kept], rtol=1e-5, atol=1e-5 * max(canvas))
        np.testing.assert_allclose(placed[~kept], np.clip(boxes[~kept], 0, None), rtol=1e-5, atol=1e-5 * max(canvas))


def test_what_is_drawn_covers_all_scales_windows_and_both_directions():
    drawn = [
        draw_placement(np.random.default_rng(seed), (50, 100), (100, 100), scale_jitter=(0.5, 2.0), hflip=0.3)
        for seed in range(2000)
    ]
    widths = np.array([placement.resized[1] for placement in drawn])
    assert (widths.min(), widths.max()) == (50, 200)
    assert abs(widths.mean() - 125) < 3
    assert abs(np.mean([placement.mirrored for placement in drawn]) - 0.3) < 0.03
    rooms = [(placement.left, width - 100) for placement, width in zip(drawn, widths, strict=True) if width > 100]
    assert all(0 <= left <= room for left, room in rooms)
    assert abs(np.mean([left / room for left, room in rooms if room > 20]) - 0.5) < 0.03
    assert {placement.left for placement, width in zip(drawn, widths, strict=True) if width <= 100} == {0}
    assert {placement.top for placement in drawn} == {0}  # never higher than the canvas
    assert {placement.upside_down for placement in drawn} == {False}


@pytest.mark.parametrize(
    "size, resized", [((480, 640), (72, 96)), ((640, 480), (96, 72)), ((10, 10), (96, 96)), ((1, 5000), (1, 96))]
)
def test_in_evaluation_the_longer_side_is_resized_and_the_rest_padded(size, resized):
    placement = whole_placement(size, (96, 96))
    assert placement.resized == placement.covered == resized
    assert (placement.top, placement.left, placement.mirrored) == (0, 0, False)
    segments = place_segments(np.zeros(size, np.uint8), placement)
    assert (segments[: resized[0], : resized[1]] == 0).all()
    assert (segments == 0).sum() == resized[0] * resized[1]
    pixels = place_pixels(np.zeros((*size, 3), np.uint8), placement)
    assert (pixels[segments == IGNORED] == _PADDING).all()
    assert (pixels[segments == 0] == 0).all()


def test_a_picture_of_the_canvas_is_left_as_it_is():
    pixels, segments, boxes = _picture((96, 96))
    placement = whole_placement((96, 96), (96, 96))
    np.testing.assert_array_equal(place_pixels(pixels, placement), pixels)
    np.testing.assert_array_equal(place_segments(segments, placement), segments)
    np.testing.assert_array_equal(place_boxes(boxes, placement)[0], boxes)


def test_boxes_are_dropped_where_too_little_of_them_is_left():
    window = Placement((100, 100), (100, 100), (50, 50), top=0, left=50)
    share = np.array([LEAST_VISIBLE + 0.01, LEAST_VISIBLE - 0.01])
    cut = np.stack([50 - 10 * (1 - share), [10, 10], 50 + 10 * share, [20, 20]], axis=1)  # over the left border
    others = np.array(
        [
            [60, 10, 70, 20],  # inside
            [10, 10, 20, 20],  # outside
            [60, 10, 60 + 0.99 * LEAST_SIDE, 20],  # too narrow to be seen
            [0, 0, 100, 100],  # a quarter of it fills the window
        ]
    )
    placed, kept = place_boxes(np.concatenate([cut, others]), window)
    assert kept.tolist() == [True, False, True, False, False, False]
    np.testing.assert_allclose(placed[0], [0, 10, 10 * share[0], 20], rtol=1e-6)
    np.testing.assert_allclose(placed[2], [10, 10, 20, 20])
    assert placed.dtype == np.float32


@pytest.mark.parametrize("turned", [{}, {"mirrored": True}, {"upside_down": True}])
def test_boxes_find_their_way_back_to_the_picture(turned):
    _, _, boxes = _picture((480, 641))
    placement = whole_placement((480, 641), (96, 96))._replace(**turned)
    placed, _ = place_boxes(boxes, placement)
    np.testing.assert_allclose(boxes_in_picture(placed, placement), boxes, atol=2e-4)
    beyond = boxes_in_picture(np.array([[-5.0, -5, 200, 200]]), placement)
    np.testing.assert_array_equal(beyond, [[0, 0, 641, 480]])


@pytest.mark.parametrize("turned", [{}, {"mirrored": True}, {"upside_down": True}])
@pytest.mark.parametrize("size", [(123, 77), (30, 40), (96, 96)])
def test_logits_are_resized_to_the_picture_as_torch_does(size, turned, monkeypatch):
    monkeypatch.setattr("train.images.geometry._STRIP", 77 * 3 * 10)  # several strips
    placement = whole_placement(size, (96, 96))._replace(**turned)
    logits = np.random.default_rng(0).normal(size=(96, 96, 3))
    rows, columns = placement.resized
    part = torch.from_numpy(logits[:rows, :columns]).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(part, size=size, mode="bilinear", align_corners=False)[0]
    expected = expected.flip([-1] * placement.mirrored + [-2] * placement.upside_down).permute(1, 2, 0).numpy()
    back = logits_in_picture(logits, placement)
    np.testing.assert_allclose(back, expected, rtol=0, atol=1e-12)
    classes = classes_in_picture(logits, placement)
    np.testing.assert_array_equal(classes, back.argmax(-1))
    assert classes.dtype == np.uint8


def test_logits_of_a_cut_picture_are_refused():
    placement = whole_placement((50, 50), (96, 96), scale=1.5)
    with pytest.raises(ValueError, match="not on the canvas"):
        logits_in_picture(np.zeros((96, 96, 2)), placement)


def test_placements_can_be_sent_to_workers():
    placement = whole_placement((50, 40), (96, 96))
    assert pickle.loads(pickle.dumps(placement)) == placement
