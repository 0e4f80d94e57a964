"""Calibration images are what evaluation sees, whatever files they come from."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from convert import ConversionError
from convert.export.calibration import calibration_images, find_images, shortage
from convert.image_files import LeftOut
from crossvit_jax.config import get_config

SQUARE = get_config("ti", image_size=48, image_scale=(1.0, 2 / 3))


def _picture(seed: int, size: tuple[int, int]) -> Image.Image:
    height, width = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@pytest.fixture
def folder(tmp_path):
    """Images in folders of folders, with what is no image among them."""
    for index, size in enumerate([(60, 80), (97, 41), (48, 48), (30, 200), (301, 299)]):
        path = tmp_path / "ab"[index % 2] / f"{index}.PNG"
        path.parent.mkdir(exist_ok=True)
        _picture(index, size).save(path)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x.png").write_text("hidden")
    return tmp_path


@pytest.mark.parametrize("image_size", [(48, 48), (48, 96), (96, 48)])
@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
def test_images_are_prepared_as_timm_does(folder, image_size, crop_pct):
    config = get_config("ti", image_size=image_size, image_scale=(1.0, 2 / 3), crop_pct=crop_pct)
    size = (3, *image_size)
    transform = create_transform(size, interpolation="bicubic", crop_pct=crop_pct)
    expected = torch.stack([transform(Image.open(path)) for path in sorted(folder.rglob("[0-9]*.PNG"))])
    images = calibration_images(str(folder), config, 5)
    assert images.dtype == np.float32 and images.flags.c_contiguous
    np.testing.assert_allclose(images, expected.permute(0, 2, 3, 1).numpy(), rtol=0, atol=1e-6)


def test_the_digits_are_real_ones_of_all_classes(folder):
    images = calibration_images("digits", SQUARE, 40)
    assert images.shape == (40, 48, 48, 3)
    assert len(np.unique(images, axis=0)) == 40
    assert 0.2 < np.ptp(images[0]) / ((1 - 0) / 0.225) <= 1.2


def test_single_images_of_many_that_cannot_be_read_are_left_out_and_told(tmp_path):
    for index in range(12):
        _picture(index, (64, 64)).save(tmp_path / f"{index:02}.png")
    (tmp_path / "03.png").write_bytes(b"broken")
    left_out = LeftOut()
    assert len(calibration_images(str(tmp_path), SQUARE, 12, left_out=left_out)) == 11
    assert left_out.notes() == [f"left out, as they cannot be read: {tmp_path / '03.png'}"]
    (tmp_path / "07.png").write_bytes(b"broken")
    with pytest.raises(ConversionError, match=r"07\.png cannot be read as an image"):
        calibration_images(str(tmp_path), SQUARE, 12)


def test_of_many_files_every_folder_gives_its_share(folder):
    names = [path.name for path in find_images(str(folder))]
    assert names == ["0.PNG", "2.PNG", "4.PNG", "1.PNG", "3.PNG"]  # a before b
    every, two = calibration_images(str(folder), SQUARE, 100), calibration_images(str(folder), SQUARE, 2)
    assert len(every) == 5
    assert np.array_equal(two, every[[0, 2]])


def test_a_folder_may_be_named_as_for_training(folder):
    assert find_images(f"folder:{folder}") == find_images(str(folder))
    with pytest.raises(ConversionError, match="digits: images come from"):
        find_images("folder:digits")


def test_linked_folders_are_followed_and_each_is_seen_once(folder, tmp_path_factory):
    links = tmp_path_factory.mktemp("links")
    for name, target in [("b", folder / "b"), ("a", folder / "a"), ("again", folder / "a")]:
        (links / name).symlink_to(target)
    (folder / "b" / "back").symlink_to(links)  # an endless way
    assert [str(path.relative_to(links)) for path in find_images(str(links))] == [
        *("a/0.PNG", "a/2.PNG", "a/4.PNG"),
        *("b/1.PNG", "b/3.PNG"),
    ]


def test_grey_and_transparent_images_become_colour(tmp_path):
    grey = np.arange(48 * 48, dtype=np.uint8).reshape(48, 48)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "grey16.png")
    Image.fromarray(grey).convert("RGBA").save(tmp_path / "rgba.png")
    images = calibration_images(str(tmp_path), SQUARE, 3)
    assert np.array_equal(images[0], images[1])
    assert np.array_equal(images[0], images[2])


def test_images_are_turned_as_in_training(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 8  # what is stored has to be turned by a quarter, counter-clockwise
    upright = _picture(0, (64, 80))
    stored = upright.transpose(Image.Transpose.ROTATE_270)
    for name, image, how in (("upright", upright, {}), ("stored", stored, {}), ("tagged", stored, {"exif": exif})):
        (tmp_path / name).mkdir()
        image.save(tmp_path / name / "0.png", **how)

    def seen(name, exif="keep"):
        return calibration_images(str(tmp_path / name), SQUARE, 1, exif)

    assert np.array_equal(seen("tagged"), seen("stored"))
    assert np.array_equal(seen("tagged", "apply"), seen("upright"))
    assert not np.array_equal(seen("tagged"), seen("upright"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "it is empty"), (b"text", "no image format that is read"), (None, "Truncated")],
)
def test_an_image_that_cannot_be_read_is_named(tmp_path, content, reason):
    buffer = io.BytesIO()
    _picture(0, (64, 64)).save(buffer, format="JPEG")
    (tmp_path / "broken.jpg").write_bytes(buffer.getvalue()[:600] if content is None else content)
    with pytest.raises(ConversionError, match=rf"broken\.jpg cannot be read as an image: .*{reason}"):
        calibration_images(str(tmp_path), SQUARE, 1)


def test_no_images_is_an_error(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ConversionError, match="no images in it"):
        find_images(str(tmp_path))
    with pytest.raises(ConversionError, match="neither"):
        find_images(str(tmp_path / "missing"))


def test_a_model_of_grey_images_is_refused(tmp_path):
    config = get_config("ti", image_size=48, image_scale=(1.0, 2 / 3), in_chans=1)
    with pytest.raises(ConversionError, match="3 channels, and the model takes 1"):
        calibration_images("digits", config, 1)


@pytest.mark.parametrize(
    ("found", "asked", "warns"),
    [(128, 128, []), (100, 128, ["100 images, 128"]), (31, 31, ["fewer than 32"]), (32, 32, [])],
)
def test_a_shortage_is_told(found, asked, warns):
    sentence = shortage(found, asked)
    assert (sentence is None) == (not warns)
    assert all(warning in sentence for warning in warns)
