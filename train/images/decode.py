"""The pixels of an encoded image, faster than by Pillow where that is the same."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from crossvit_jax.preprocess import Exif, decode_image, max_pixels, orientation, turned

try:
    import simplejpeg
except ModuleNotFoundError:  # of the extra `train`; Pillow's pixels are the same
    simplejpeg = None

_JPEG = b"\xff\xd8\xff"
_ORDINARY = 2**26  # pixels; larger images are Pillow's, which warns of them or refuses them


def decode_pixels(
    encoded: bytes, name: str, exif: Exif = "keep", formats: Sequence[str] | None = None
) -> UInt8[np.ndarray, "height width 3"]:
    """The pixels of `crossvit_jax.preprocess.decode_image`. Those of an ordinary JPEG file cost a third less where
    simplejpeg is installed, by the same library as Pillow's.

    Args:
        formats: those that may be read, see there; JPEG is always one of them.

    Raises UnreadableImage as it does.
    """
    if simplejpeg is not None and encoded.startswith(_JPEG):
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(encoded)
            if colours in ("YCbCr", "Gray") and height * width <= min(_ORDINARY, max_pixels()):
                pixels = simplejpeg.decode_jpeg(encoded)
                lying = orientation(encoded) if exif == "apply" else 1
                return pixels if lying == 1 else np.array(turned(Image.fromarray(pixels), lying))
        except ValueError:
            pass  # Pillow may be able to use it, or says what is wrong
    return np.array(decode_image(encoded, name, exif=exif, formats=formats))
