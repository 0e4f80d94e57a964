"""What `preprocess_image` makes of an image is what timm's evaluation transform and that of training make of it."""

import io
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from PIL import Image
from timm.data import create_transform

from crossvit_jax import get_config, preprocess_image
from crossvit_jax.preprocess import UnreadableImage, evaluation_crop, normalised
from train.images.transforms import eval_transform

_SIZES = [(90, 130), (90, 61), (90, 90), (8, 7), (1, 3), (55, 110), (130, 37)]


def _image(size, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))


@pytest.mark.parametrize(
    ("image_size", "crop_pct"), [((240, 240), 0.875), ((48, 48), 0.6), ((48, 96), 1.0), ((72, 48), 0.6)]
)
def test_it_has_the_pixels_of_timm_and_of_the_evaluation_of_a_run(tmp_path, image_size, crop_pct):
    config = get_config("ti", image_size=image_size, image_scale=(1.0, 2 / 3), crop_pct=crop_pct)
    timms, ours = create_transform((3, *image_size), interpolation="bicubic", crop_pct=crop_pct), eval_transform(config)
    for number, size in enumerate(_SIZES):
        image, path = _image(size, number), tmp_path / f"{number}.png"
        image.save(path)
        given = preprocess_image(path, config)
        assert given.dtype == np.float32 and given.shape == (*image_size, 3) and given.flags.c_contiguous
        np.testing.assert_array_equal(given, timms(image).permute(1, 2, 0).numpy())
        seen = ours({"image": path.read_bytes(), "label": 0, "name": ""})["image"]
        np.testing.assert_array_equal(given, normalised(seen))
        for same in (str(path), image, np.asarray(image)):
            np.testing.assert_array_equal(preprocess_image(same, config), given)


@pytest.mark.parametrize(
    ("image_size", "crop_pct"), [((240, 240), 0.875), ((48, 48), 0.6), ((48, 96), 1.0), ((48, 48), 0.1)]
)
def test_of_a_large_resized_image_only_the_middle_is_made_with_the_same_pixels(image_size, crop_pct, monkeypatch):
    rng = np.random.default_rng(0)
    for size in (*_SIZES, (3, 150), (150, 2), (900, 8), (700, 600)):
        pixels = rng.choice([0, 60, 255], (*size, 3)).astype(np.uint8)
        expected = evaluation_crop(pixels, image_size, crop_pct)
        with monkeypatch.context() as patch:
            patch.setattr("crossvit_jax.preprocess._LARGEST", 0)
            given = evaluation_crop(pixels, image_size, crop_pct, resize=lambda *_: pytest.fail("all of it was made"))
        np.testing.assert_array_equal(given, expected)


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (2, 89_000_000)])
def test_a_picture_far_longer_than_wide_takes_little_memory(size):
    pixels = np.random.default_rng(0).integers(0, 256, (*(min(side, 20_000) for side in size), 3), np.uint8)
    pixels = np.broadcast_to(pixels[:, :1], (*size, 3)) if size[1] > 20_000 else pixels
    tracemalloc.start()
    crop = evaluation_crop(pixels, (240, 240), 0.875)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert crop.shape == (240, 240, 3)
    assert most < 2**25
    # a few pixels from its middle fill all of it
    middle = pixels[max(0, size[0] // 2 - 20) :][:40, max(0, size[1] // 2 - 20) :][:, :40]
    np.testing.assert_array_equal(crop, evaluation_crop(middle, (240, 240), 0.875))


def test_an_image_that_pillow_has_opened_is_made_rgb_as_a_file_is(tmp_path):
    deep = Image.fromarray(np.arange(48 * 48, dtype=np.uint16).reshape(48, 48) * 28)
    palette = _image((48, 48)).quantize(8)
    for number, image in enumerate((deep, palette, _image((48, 48)).convert("RGBA"))):
        path = tmp_path / f"{number}.png"
        image.save(path)
        expected = preprocess_image(path, get_config("ti"))
        np.testing.assert_array_equal(preprocess_image(image, get_config("ti")), expected)
        with Image.open(path) as opened:
            np.testing.assert_array_equal(preprocess_image(opened, get_config("ti")), expected)


def test_what_is_no_image_is_a_value_error_that_names_it(tmp_path):
    file = io.BytesIO()
    _image((64, 64)).save(file, "JPEG")
    (tmp_path / "half.jpg").write_bytes(file.getvalue()[:600])
    config = get_config("ti")
    for name, reason in (("half.jpg", "Truncated"), ("none.jpg", "No such file"), ("", "a folder, not a regular file")):
        with pytest.raises(UnreadableImage, match=f"cannot read image {tmp_path / name}: .*{reason}"):
            preprocess_image(tmp_path / name, config)
    with pytest.raises(ValueError, match="mode F: floating-point pixels have no known range"):
        preprocess_image(Image.new("F", (9, 9)), config)
    with pytest.raises(ValueError, match=r"pixels must be uint8 \(height, width, 3\); got float32 \(9, 9, 3\)"):
        preprocess_image(np.zeros((9, 9, 3), np.float32), config)
    with pytest.raises(ValueError, match=r"got uint8 \(0, 9, 3\)"):
        preprocess_image(np.zeros((0, 9, 3), np.uint8), config)
    with pytest.raises(ValueError, match="images have 3 channels here, and the model takes 1"):
        preprocess_image(tmp_path / "half.jpg", get_config("ti", in_chans=1))


def test_it_needs_neither_jax_nor_torch():
    program = """
import sys
import numpy as np
from crossvit_jax import get_config, preprocess_image
assert preprocess_image(np.zeros((9, 9, 3), np.uint8), get_config("ti")).shape == (240, 240, 3)
assert not {"jax", "torch", "timm", "numba", "simplejpeg", "train", "convert"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
