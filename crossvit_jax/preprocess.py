"""From an image file to the model's input, as evaluation makes it: decoded, resized, cut and normalised.

Needs numpy and Pillow only. Where a run has many images, `train.images` makes the same pixels faster.
"""

import contextlib
import io
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float32, Float64, UInt8
from PIL import ExifTags, Image, UnidentifiedImageError

from crossvit_jax.config import CrossViTConfig
from crossvit_jax.files import MAX_PIXELS, read_regular

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's: what every published CrossViT was trained with
Exif = Literal["keep", "apply"]  # images as they are stored, as timm takes them; or turned as EXIF says

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF orientation; 1 is upright
# some of it is in every file whose EXIF or XMP data, or whose format (AVIF), tells an orientation
_ORIENTATION_MARKS = (b"Exif", b"EXIF", b"eXIf", b"tiff:Orientation", b"Raw profile type", b"adobe.xmp")
_ORIENTATION_MARKS += (b"irot", b"imir")
# Pillow's names of the formats that are read, whatever a file is called: others start programs (EPS does), fetch other
# files, or are read by hardly tried code
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
_MAX_PIXELS = "CROSSVIT_MAX_PIXELS"  # in the environment, so that worker processes know
_LARGEST_FILE = 2**31  # bytes
_LARGEST = 2**24  # pixels that an image may be resized to as a whole

# Every worker would print them, in every epoch. What cannot be used is an error; the rest (odd metadata, many pixels)
# does no harm. Not `catch_warnings`: reader threads would undo each other's.
warnings.filterwarnings("ignore", module=r"PIL\.")


_pillows_limit_lock = threading.Lock()


class UnreadableImage(ValueError):
    """One image that cannot be read or decoded: its `name`, and the `reason` in a few words."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)  # the arguments as they are, so that it can be pickled
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"cannot read image {self.name}: {self.reason}"


def preprocess_image(
    image: str | os.PathLike | Image.Image | np.ndarray, config: CrossViTConfig, *, exif: Exif = "keep"
) -> Float32[np.ndarray, "height width 3"]:
    """The model's input for an image: timm's evaluation transform.

    The shorter side is resized to the model's ÷ `crop_pct`, bicubic; the centre is cut out and normalised.

    Args:
        image: the path of an image file of any kind, an image that Pillow has opened, or uint8 RGB pixels (height,
            width, 3). Transparency is dropped, of an animation the first picture is taken.
        config: of the model, for its image size and `crop_pct`.
        exif: what `decode_image` takes.

    Raises:
        ValueError: the model takes no colour images, or the array is none. UnreadableImage, a ValueError, where the
            file cannot be read or decoded, or has values that do not tell how bright they are.
    """
    if config.in_chans != 3:
        raise ValueError(f"images have 3 channels here, and the model takes {config.in_chans}")
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(f"pixels must be uint8 (height, width, 3); got {image.dtype} {image.shape}")
        pixels = image
    elif isinstance(image, Image.Image):
        name = getattr(image, "filename", "") or f"of mode {image.mode}"
        with _failures_named(str(name)):
            pixels = np.asarray(_to_rgb(image, exif))
    else:
        pixels = np.asarray(read_image(image, exif=exif))
    return normalised(evaluation_crop(pixels, config.image_size, config.crop_pct))


# --- decoding ---


def read_image(path: str | os.PathLike, *, exif: Exif = "keep") -> Image.Image:
    """An image file as an RGB image. Raises UnreadableImage as `decode_image` does, and if there is no such file."""
    try:
        encoded = read_image_file(path)
    except OSError as error:
        raise UnreadableImage(os.fspath(path), error.strerror or str(error)) from error
    return decode_image(encoded, os.fspath(path), exif=exif)


def read_image_file(path: str | os.PathLike) -> bytes:
    """The bytes of an image file. Raises OSError, also for what is no regular file, and for one that is far larger than
    any picture."""
    return read_regular(path, at_most=_LARGEST_FILE)


def decode_image(
    encoded: bytes,
    name: str,
    *,
    exif: Exif = "keep",
    formats: Sequence[str] | None = None,
    before: Callable[[Image.Image], None] | None = None,
) -> Image.Image:
    """An image file's bytes as an RGB image. Transparency is dropped, of an animation the first picture is taken.

    Read as torchvision's and timm's loaders do, but for 16-bit grey.

    Args:
        exif: "apply" turns an image as its EXIF orientation says, as `PIL.ImageOps.exif_transpose` does; "keep" takes
            it as it is stored. (TIFF files Pillow turns by itself.)
        formats: those that may be read, by Pillow's names; none: all that Pillow knows.
        before: told the image when only its header is read, before memory is taken for its pixels.

    Raises UnreadableImage if they are no whole image, or one whose values do not tell how bright they are.
    """
    if not encoded:
        raise UnreadableImage(name, "it is empty")
    with _failures_named(name):
        image = open_image(encoded, formats)
        if before is not None:
            before(image)
        return _to_rgb(image, exif)


def limit_pixels(count: int | None) -> None:
    """Images of more pixels are unreadable from now on, here and in processes that are started; None: `MAX_PIXELS`.

    The number is read from an image's header, before any memory is taken for its pixels.
    """
    os.environ[_MAX_PIXELS] = str(count or MAX_PIXELS)


def max_pixels() -> int:
    """What `limit_pixels` was told."""
    return int(os.environ.get(_MAX_PIXELS, MAX_PIXELS))


def open_image(encoded: bytes, formats: Sequence[str] | None = None) -> Image.Image:
    """An image of which no more than the header is read.

    Args:
        formats: that are looked for; none: all that are read.

    Raises ValueError for one of more pixels than `limit_pixels` allows, and whatever Pillow raises.
    """
    limit = max_pixels()
    with _pillows_limit_lock:
        pillows, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # ours is told better, and can be raised
        try:
            image = Image.open(io.BytesIO(encoded), formats=FORMATS if formats is None else formats)
        finally:
            Image.MAX_IMAGE_PIXELS = pillows
    width, height = image.size
    if width * height > limit:
        raise ValueError(f"it has {width:,} x {height:,} pixels; at most {limit:,} in all are read (--max-pixels)")
    return image


def orientation(encoded: bytes) -> int:
    """The EXIF orientation of an image file, from 2 to 8 where "apply" turns it; 1 for all others, also unreadable
    ones. Quick where there is none: the file is not decoded."""
    if not any(mark in encoded for mark in _ORIENTATION_MARKS):
        return 1
    try:
        image = open_image(encoded)
        return 1 if image.format == "TIFF" else _orientation(image)
    except MemoryError:
        raise
    except Exception:  # as in `_failures_named`
        return 1


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """An image whose EXIF orientation is this, upright."""
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


@contextlib.contextmanager
def _failures_named(name: str) -> Iterator[None]:
    """What Pillow raises inside the block becomes UnreadableImage."""
    try:
        yield
    except MemoryError:
        raise  # the machine's fault
    except UnidentifiedImageError as error:
        raise UnreadableImage(name, f"it is in no image format that is read: {', '.join(FORMATS)}") from error
    except Exception as error:  # over damaged files Pillow's parsers stumble in any way: TypeError, OverflowError
        raise UnreadableImage(name, " ".join(str(error).split()) or type(error).__name__) from error


def _orientation(image: Image.Image) -> int:
    try:
        found = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged metadata do no harm to the pixels
        return 1
    return found if isinstance(found, int) and found in _TURNS else 1


def _to_rgb(image: Image.Image, exif: Exif) -> Image.Image:
    if exif == "apply":
        image.load()  # some formats tell only then, and TIFF files are upright then
        image = turned(image, _orientation(image))
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


# --- resizing, cutting, normalising ---


def resize(
    pixels: UInt8[np.ndarray, "height width 3"], size: tuple[int, int]
) -> UInt8[np.ndarray, "out_height out_width 3"]:
    """Bicubic resizing to a size (height, width), by Pillow: antialiased, and rounded to 8 bits after either axis."""
    return np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC))


def evaluation_crop(
    pixels: UInt8[np.ndarray, "height width 3"],
    image_size: tuple[int, int],
    crop_pct: float,
    *,
    resize: Callable[[np.ndarray, tuple[int, int]], np.ndarray] = resize,
) -> UInt8[np.ndarray, "rows columns 3"]:
    """The part of an image that evaluation looks at, of the model's size (height, width).

    Args:
        crop_pct: share of the resized image that is kept; above 1, black is put around it.
        resize: as `resize` of this module, or faster with the same pixels.
    """
    size = _resized(pixels.shape[:2], image_size, crop_pct)
    large = math.prod(size) > _LARGEST
    resized = _middle_resized(pixels, size, image_size) if large else resize(pixels, size)
    missing = [max(0, wanted - size) for wanted, size in zip(image_size, resized.shape, strict=False)]
    if any(missing):
        resized = np.pad(resized, [(size // 2, (size + 1) // 2) for size in missing] + [(0, 0)])
    # Python's rounding, of halves to even numbers, as in torchvision
    top, left = (round((size - wanted) / 2) for size, wanted in zip(resized.shape, image_size, strict=False))
    return resized[top : top + image_size[0], left : left + image_size[1]]


def _resized(size: tuple[int, int], image_size: tuple[int, int], crop_pct: float) -> tuple[int, int]:
    """The size that an image is resized to before it is cut: torchvision's for square models, timm's for others."""
    wanted = [math.floor(side / crop_pct) for side in image_size]
    if wanted[0] == wanted[1]:
        height, width = (side * wanted[0] // min(size) for side in size)
    else:
        ratio = min(side / goal for side, goal in zip(size, wanted, strict=True))
        height, width = (round(side / ratio) for side in size)
    return height, width


def _middle_resized(
    pixels: UInt8[np.ndarray, "height width 3"], size: tuple[int, int], image_size: tuple[int, int]
) -> UInt8[np.ndarray, "rows columns 3"]:
    """The middle of what `resize` makes of an image, at most of the model's size (height, width); the rest of it, which
    may be gigabytes of a picture far longer than wide, is not computed."""
    height, width = pixels.shape[:2]
    (top, bottom, rows), (left, right, columns) = (
        _middle_weights(old, new, min(new, wanted))
        for old, new, wanted in zip((height, width), size, image_size, strict=True)
    )
    part = pixels[top:bottom, left:right].astype(np.float64)  # in which the sums, of whole numbers, are exact
    if height > 100 * width and size[0] < height:  # Pillow's order for them
        part = np.matmul(columns, _levels(np.tensordot(rows, part, 1)))
    else:
        part = np.tensordot(rows, _levels(np.matmul(columns, part)), 1)
    return _levels(part).astype(np.uint8)


def _middle_weights(size: int, resized: int, kept: int) -> tuple[int, int, Float64[np.ndarray, "kept pixels"]]:
    """Of an axis that is resized: the first pixel that the places in its middle are made of, the one after the last,
    and Pillow's weights of the pixels for each place, in units of 2^-22."""
    scale = size / resized
    stretch = max(scale, 1.0)
    reach = 2.0 * stretch
    centres = (np.arange(kept) + round((resized - kept) / 2) + 0.5) * scale
    first, after = max(int(centres[0] - reach + 0.5), 0), min(int(centres[-1] + reach + 0.5), size)
    x = np.abs((np.arange(first, after) - centres[:, None] + 0.5) * (1.0 / stretch))
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5  # the cubic with a = -0.5
    exact = np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
    weights = exact / np.cumsum(exact, 1)[:, -1:] * 2**22  # one after the other, as Pillow adds them up
    return first, after, np.trunc(weights + np.copysign(0.5, weights))


def _levels(sums: Float64[np.ndarray, "..."]) -> Float64[np.ndarray, "..."]:
    """Sums in units of 2^-22, rounded to whole levels from 0 to 255."""
    return np.clip(np.floor((sums + 2**21) / 2**22), 0, 255)


def normalised(pixels: UInt8[np.ndarray, "*batch height width 3"]) -> Float32[np.ndarray, "*batch height width 3"]:
    """Pixels as the model takes them: timm's `ToTensor` and `Normalize`, channels last, in new memory."""
    width = pixels.shape[-2]
    rows = pixels.reshape(*pixels.shape[:-2], -1) / np.float32(255)
    # a value for each of a row: numpy is slow at using the same three again and again
    rows -= np.tile(np.float32(MEAN), width)
    rows /= np.tile(np.float32(STD), width)
    return rows.reshape(pixels.shape)
