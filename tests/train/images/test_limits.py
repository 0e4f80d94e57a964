"""Pictures of more pixels than are read, of formats that are not, and of no usual shape."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from convert.image_files import FORMATS as SUFFIXES
from crossvit_jax import preprocess
from crossvit_jax.preprocess import FORMATS, UnreadableImage, decode_image, limit_pixels
from train.images.decode import decode_pixels
from train.images.transforms import EvalTransform


@pytest.fixture(autouse=True)
def _limit(monkeypatch):
    monkeypatch.setenv("CROSSVIT_MAX_PIXELS", str(preprocess.MAX_PIXELS))


def _png(width, height):
    """A whole PNG of one colour, of few bytes."""
    rows = zlib.compress(b"\0" * ((width + 1) * height)) if width * height < 2**22 else b""
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\0\0\0\0"

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def _encoded(form, size=(30, 20)):
    file = io.BytesIO()
    Image.new("RGB", size).save(file, form)
    return file.getvalue()


def test_pixels_are_counted_in_the_header():
    for decode in (decode_image, decode_pixels):
        with pytest.raises(UnreadableImage, match="it has 13,378 x 13,378 pixels; at most 178,956,970 in all"):
            decode(_png(13_378, 13_378), "x.png")
    limit_pixels(599)
    for encoded in (_encoded("PNG"), _encoded("JPEG"), _encoded("WEBP")):
        with pytest.raises(UnreadableImage, match=r"30 x 20 pixels; at most 599 in all are read \(--max-pixels\)"):
            decode_pixels(encoded, "x")
    limit_pixels(600)
    assert decode_pixels(_encoded("JPEG"), "x").shape == (20, 30, 3)


def test_more_than_pillow_itself_would_read_can_be_asked_for(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    limit_pixels(10**9)
    assert decode_image(_encoded("PNG"), "x").size == (30, 20)
    assert Image.MAX_IMAGE_PIXELS == 100  # others' setting stays


@pytest.mark.parametrize("form", ["EPS", "PCX", "ICO", "TGA", "PDF", "SGI"])
def test_other_formats_are_not_tried_whatever_the_file_is_called(form):
    with pytest.raises(UnreadableImage, match="it is in no image format that is read: JPEG, PNG, "):
        decode_image(_encoded(form), "x.png")


def test_the_formats_are_those_whose_files_are_looked_for():
    assert set(FORMATS) == set(SUFFIXES)


@pytest.mark.parametrize("size", [(1, 65_535), (65_535, 1), (3, 20_000)])
def test_of_a_picture_far_longer_than_wide_only_the_middle_is_resized(size):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    image = EvalTransform((48, 48), 0.875)({"image": file.getvalue(), "label": 0, "name": "x"})["image"]
    assert (image.shape, image.dtype) == ((48, 48, 3), np.uint8)
