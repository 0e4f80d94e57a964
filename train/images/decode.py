"""The pixels of an encoded image, faster than by Pillow where that is the same."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from crossvit_jax.preprocess import Exif, decode_image, max_pixels, orientation, turned
from train.devices.decoding import decoding_memory

try:
    import simplejpeg
except ModuleNotFoundError:  # of the extra `train`; Pillow's pixels are the same
    simplejpeg = None

_JPEG = b"\xff\xd8\xff"
_ORDINARY = 2**26  # pixels; larger images are Pillow's, which warns of them or refuses them
# What a pixel takes while an image is decoded and resized, measured and rounded up: its channels inside the library
# and as Pillow has them, and the copies on the way to an array
_JPEG_BYTES, _BYTES, _BYTES_OF_FORMATS = 8, 14, {"WEBP": 18, "AVIF": 18, "JPEG2000": 26}


def decode_pixels(
    encoded: bytes, name: str, exif: Exif = "keep", formats: Sequence[str] | None = None, *, at_least: int = 0
) -> UInt8[np.ndarray, "height width 3"]:
    """The pixels of `crossvit_jax.preprocess.decode_image`. Those of an ordinary JPEG file cost a third less where
    simplejpeg is installed, by the same library as Pillow's.

    An image of many pixels waits until there is memory for it, see `train.devices.decoding`.

    Args:
        formats: those that may be read, see there; JPEG is always one of them.
        at_least: bytes that the caller will take for each pixel, while it is in a block of `returned`.

    Raises UnreadableImage as it does.
    """
    memory = decoding_memory()

    def before(image: Image.Image) -> None:
        memory.take(image.width * image.height, max(_BYTES_OF_FORMATS.get(image.format, _BYTES), at_least))

    with memory.returned():
        pixels = _jpeg_pixels(encoded, exif, at_least)
        if pixels is None:
            pixels = np.array(decode_image(encoded, name, exif=exif, formats=formats, before=before))
    return pixels


def _jpeg_pixels(encoded: bytes, exif: Exif, at_least: int) -> UInt8[np.ndarray, "height width 3"] | None:
    """None for what is no ordinary JPEG file."""
    if simplejpeg is not None and encoded.startswith(_JPEG):
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(encoded)
            if colours in ("YCbCr", "Gray") and height * width <= min(_ORDINARY, max_pixels()):
                decoding_memory().take(height * width, max(_JPEG_BYTES, at_least))
                pixels = simplejpeg.decode_jpeg(encoded)
                lying = orientation(encoded) if exif == "apply" else 1
                return pixels if lying == 1 else np.array(turned(Image.fromarray(pixels), lying))
        except ValueError:
            pass  # Pillow may be able to use it, or says what is wrong
    return None
