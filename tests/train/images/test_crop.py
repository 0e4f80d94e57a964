"""Workers that only crop give timm's crops: its draws, Pillow's pixels."""

import io
import random
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from timm.data import transforms
from torchvision.transforms import functional

from train.images.crop import CropTransform, draw_crop
from train.images.decode import UnreadableImage
from train.images.resample import resize

_SCALE, _RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def _jpeg(image):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=92)
    return file.getvalue()


# of the last three no box of this shape fits, so that the largest one in the middle is taken
@pytest.mark.parametrize("size", [(427, 640), (50, 50), (10, 300), (300, 10), (1, 5)])
def test_boxes_are_drawn_as_by_timm(size, monkeypatch):
    image = Image.new("1", size[::-1])
    for seed in range(100):
        monkeypatch.setattr(transforms, "random", random.Random(seed))
        expected = transforms.RandomResizedCropAndInterpolation.get_params(image, _SCALE, _RATIO)
        assert draw_crop(random.Random(seed), size, _SCALE, _RATIO) == expected


def test_a_box_has_at_least_one_pixel():
    """timm draws none of an image of so few, and then cannot resize it."""
    for seed in range(50):
        *_, height, width = draw_crop(np.random.default_rng(seed), (2, 2), _SCALE, _RATIO)
        assert height > 0 < width


def test_a_crop_has_the_pixels_of_timms(photographs):
    transform = CropTransform((240, 224), _SCALE, _RATIO)
    for seed in range(8):
        encoded = _jpeg(photographs[seed % 2])
        sample = {"image": encoded, "label": 3, "name": "photograph"}
        ours = transform(sample, np.random.default_rng(seed))
        image = Image.open(io.BytesIO(encoded))
        box = draw_crop(np.random.default_rng(seed), image.size[::-1], _SCALE, _RATIO)
        bicubic = functional.InterpolationMode.BICUBIC
        np.testing.assert_array_equal(ours["image"], functional.resized_crop(image, *box, (240, 224), bicubic))
        assert (ours["image"].dtype, ours["label"], ours["label"].dtype) == (np.uint8, 3, np.int32)


def test_an_unreadable_image_is_told_before_anything_is_drawn():
    rng = np.random.default_rng(0)
    with pytest.raises(UnreadableImage):
        CropTransform((8, 8), _SCALE, _RATIO)({"image": b"no image", "label": 0, "name": "some"}, rng)
    assert rng.random() == np.random.default_rng(0).random()


def test_a_worker_that_crops_needs_no_torch():
    """Importing it takes seconds, and half a gigabyte in every worker."""
    modules = "train.main, train.data.batches, train.images.crop, train.images.resample"
    program = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


# --- resizing ---


@pytest.mark.parametrize("size", [(240, 240), (48, 31), (1, 1), (427, 640), (500, 900)])
def test_a_photograph_is_resized_as_by_pillow(photographs, size):
    for photograph in photographs:
        expected = photograph.resize(size[::-1], Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(resize(np.array(photograph), size), expected)


def test_every_size_of_noise_is_resized_as_by_pillow():
    """Noise overshoots most, beyond black and white."""
    rng = np.random.default_rng(0)
    for _ in range(150):
        height, width, *size = (int(n) for n in np.exp(rng.uniform(0, np.log(300), 4)))
        pixels = rng.choice([0, 255], (height, width, 3)).astype(np.uint8)
        expected = Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(resize(pixels, tuple(size)), expected)


def test_a_part_of_an_image_is_resized_by_itself():
    """As timm does it: pixels beyond the box have no say."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    part = pixels[7:30, 11:40]
    np.testing.assert_array_equal(resize(part, (16, 16)), resize(part.copy(), (16, 16)))
