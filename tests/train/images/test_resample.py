"""Images are resized to the pixels of Pillow's."""

import numpy as np
import pytest
from PIL import Image

from train.images.resample import resize


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
