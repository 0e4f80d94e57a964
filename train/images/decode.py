"""An encoded image of any kind as 8-bit RGB, read as torchvision's and timm's loaders do, but for 16-bit grey."""

import io
import warnings

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

# Every worker would print them, in every epoch. What cannot be used is an error; the rest (odd metadata, many pixels)
# does no harm. Not `catch_warnings`: reader threads would undo each other's.
warnings.filterwarnings("ignore", module=r"PIL\.")


_JPEG = b"\xff\xd8\xff"
_ORDINARY = 2**26  # pixels; larger images are Pillow's, which warns of them or refuses them


class UnreadableImage(ValueError):
    """One image that cannot be read or decoded: its `name`, and the `reason` in a few words."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)  # the arguments as they are, so that it can be pickled
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"cannot read image {self.name}: {self.reason}"


def decode_image(encoded: bytes, name: str) -> Image.Image:
    """An image file's bytes as an RGB image. Transparency is dropped, of an animation the first picture is taken.

    Raises UnreadableImage if they are no whole image, or one whose values do not tell how bright they are.
    """
    if not encoded:
        raise UnreadableImage(name, "it is empty")
    try:
        return _to_rgb(Image.open(io.BytesIO(encoded)))
    except MemoryError:
        raise  # the machine's fault
    except UnidentifiedImageError as error:
        raise UnreadableImage(name, "it is in no image format that Pillow knows") from error
    except Exception as error:  # over damaged files Pillow's parsers stumble in any way: TypeError, OverflowError
        raise UnreadableImage(name, " ".join(str(error).split()) or type(error).__name__) from error


def decode_pixels(encoded: bytes, name: str) -> UInt8[np.ndarray, "height width 3"]:
    """The pixels of `decode_image`. Those of an ordinary JPEG file cost a third less, by the same library as Pillow's.

    Raises UnreadableImage as it does.
    """
    if encoded.startswith(_JPEG):
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(encoded)
            if colours in ("YCbCr", "Gray") and height * width <= _ORDINARY:
                return simplejpeg.decode_jpeg(encoded)
        except ValueError:
            pass  # Pillow may be able to use it, or says what is wrong
    return np.array(decode_image(encoded, name))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey (modes `I;16…`, and `I` where Pillow has made it 32) as `L`.

    The high byte, which is what Pillow itself takes of 16-bit colour; its conversion of grey would cut off at 255.
    """
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError("32-bit pixels have no known range")
    return Image.fromarray((values >> 8).astype(np.uint8))
