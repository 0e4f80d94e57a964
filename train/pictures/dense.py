"""Pictures with boxes and masks drawn on them, and sheets of several such pictures."""

import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from convert.files import write_whole
from crossvit_jax.preprocess import MEAN, STD
from train.pictures.figure import SOFTWARE, drawable

_NOTHING = 255  # in masks: counts nowhere, and is left as it is
_TILE = 288  # pixels of the longer side of a picture in a sheet, about
_GAP, _CAPTION = 8, 18  # pixels
_LONGEST_NAME, _LONGEST_CAPTION, _LONGEST_TITLE = 16, 40, 100  # characters
_SIDES_OF_LINE = 20  # a box's shorter side is at least so many lines, or what is in it could not be seen
_SHARE = 0.55  # of the colour of a class over the picture
_FIRST_COLOURS = bytes.fromhex("4c72b0 dd8452 55a868 c44e52 8172b3 ccb974 64b5cd e377c2 bcbd22 937860 17becf 8c8c8c")


@cache
def palette() -> UInt8[np.ndarray, "256 3"]:
    """A colour for each class, told apart easily for the first dozen; that of what counts nowhere is white.

    Also the palette of masks that are written as PNG.
    """
    first = np.frombuffer(_FIRST_COLOURS, np.uint8).reshape(-1, 3)
    more = np.random.default_rng(0).integers(48, 232, (256 - len(first), 3), dtype=np.uint8)
    colours = np.concatenate([first, more])
    colours[_NOTHING] = 255
    return colours


def mask_png(segments: UInt8[np.ndarray, "height width"]) -> bytes:
    """A mask as PNG: its values are the classes, its palette `palette`."""
    image = Image.frombytes("P", segments.shape[::-1], np.ascontiguousarray(segments).tobytes())
    image.putpalette(palette().tobytes())
    return png_of(image)


def pixels_of(images: np.ndarray) -> UInt8[np.ndarray, "*batch height width 3"]:
    """The pixels of images as batches have them: normalised values, or uint8, which is left as it is."""
    if images.dtype == np.uint8:
        return images
    return (np.clip(images * np.float32(STD) + np.float32(MEAN), 0, 1) * 255 + 0.5).astype(np.uint8)


def with_boxes(
    pixels: UInt8[np.ndarray, "height width 3"],
    boxes: Float[np.ndarray, "boxes 4"],
    classes: Int[np.ndarray, " boxes"],
    class_names: Sequence[str],
    *,
    scores: Float[np.ndarray, " boxes"] | None = None,
    scale: int = 1,
) -> Image.Image:
    """A picture with boxes, in the colours of their classes; with the classes' names, and the scores if there are some,
    where a box is large enough for that.

    Args:
        boxes: x1, y1, x2, y2 in pixels of the picture.
        scale: so many times larger is the result.
    """
    height, width = pixels.shape[:2]
    image = Image.fromarray(pixels).resize((width * scale, height * scale), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(image)
    line = max(1, round(max(image.size) / 250))
    font = _font(max(10, round(max(image.size) / 28)))
    order = range(len(boxes)) if scores is None else np.argsort(scores)  # the best ones on top
    for place in order:
        colour = tuple(palette()[classes[place] % _NOTHING].tolist())
        left, top, right, bottom = (boxes[place] * scale).tolist()
        thin = max(1, min(line, round(min(right - left, bottom - top) / _SIDES_OF_LINE)))
        draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=colour, width=thin)
        name = drawable(class_names[classes[place]], _LONGEST_NAME)
        label = name if scores is None else f"{name} {100 * scores[place]:.0f} %"
        _write(draw, (left, top, right, bottom), label, font, colour, image.size)
    return image


def with_segments(
    pixels: UInt8[np.ndarray, "height width 3"], segments: UInt8[np.ndarray, "height width"], *, scale: int = 1
) -> Image.Image:
    """A picture with the colours of its pixels' classes laid over it; what counts nowhere stays as it is.

    Args:
        scale: so many times larger is the result.
    """
    colours = palette()[segments]
    mixed = ((1 - _SHARE) * pixels + _SHARE * colours + 0.5).astype(np.uint8)
    mixed = np.where((segments == _NOTHING)[..., None], pixels, mixed)
    height, width = segments.shape
    return Image.fromarray(mixed).resize((width * scale, height * scale), Image.Resampling.NEAREST)


def sheet_scale(height: int, width: int) -> int:
    """How many times larger pictures of a size are drawn in a sheet."""
    return max(1, round(_TILE / max(height, width)))


def legend(class_names: Sequence[str], classes: Sequence[int], width: int) -> Image.Image:
    """The names of some classes beside their colours, in lines of so many pixels."""
    font, line = _font(13), 20
    places, x, y = [], 0, 0
    for index in classes:
        name = drawable(class_names[index], _LONGEST_NAME)
        needed = round(font.getlength(name)) + 30
        if x and x + needed > width:
            x, y = 0, y + line
        places.append((x, y, index, name))
        x += needed
    image = Image.new("RGB", (width, y + line), "white")
    draw = ImageDraw.Draw(image)
    for x, y, index, name in places:
        draw.rectangle((x, y + 3, x + 13, y + 16), fill=tuple(palette()[index].tolist()))
        draw.text((x + 18, y + 1), name, "black", font)
    return image


def save_sheet(
    path: Path,
    pictures: Sequence[Image.Image],
    *,
    columns: int,
    title: str,
    captions: Sequence[str] = (),
    below: Image.Image | None = None,
) -> None:
    """Write pictures in rows, each with its caption, as one PNG, whole or not at all.

    Args:
        below: what is shown below them all, such as a `legend`.

    Raises NotWritten if it cannot be written.
    """
    width, height = (max(picture.size[axis] for picture in pictures) for axis in (0, 1))
    caption = _CAPTION if captions else 0
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    head, font = 28, _font(13)
    top_of_legend = head + rows * (height + caption + _GAP)
    size = (
        columns * (width + _GAP) + _GAP,
        top_of_legend + (below.size[1] + _GAP if below is not None else 0),
    )
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, 6), drawable(title, _LONGEST_TITLE), "black", _font(15))
    for place, picture in enumerate(pictures):
        x = _GAP + place % columns * (width + _GAP)
        y = head + place // columns * (height + caption + _GAP)
        sheet.paste(picture, (x, y + caption))
        if place < len(captions):
            draw.text((x, y), drawable(captions[place], _LONGEST_CAPTION), "black", font)
    if below is not None:
        sheet.paste(below, (_GAP, top_of_legend))
    write_whole(path, png_of(sheet))


def sheet_width(pictures: Sequence[Image.Image], columns: int) -> int:
    """Of what is inside a sheet of these pictures, for a `legend`."""
    return min(columns, len(pictures)) * (max(picture.size[0] for picture in pictures) + _GAP) - _GAP


def _write(draw, box, label, font, colour, size) -> None:
    """A label above a box, or inside where there is no room above; none where the box is too small for it."""
    left, top, right, bottom = draw.textbbox((0, 0), label, font)
    width, height = right - left + 4, bottom - top + 4
    if width > box[2] - box[0] + 4 or height > (box[3] - box[1]) / 2:
        return  # it would hide what is around; a legend tells the colours
    x = min(max(0, box[0]), max(0, size[0] - width))
    y = box[1] - height if box[1] >= height else box[1]
    draw.rectangle((x, y, x + width, y + height), fill=colour)
    draw.text((x + 2 - left, y + 2 - top), label, "white", font)


@cache
def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def png_of(image: Image.Image) -> bytes:
    """A picture as PNG; `is_own_picture` knows it."""
    about = PngImagePlugin.PngInfo()
    about.add_text("Software", SOFTWARE)
    file = io.BytesIO()
    image.save(file, format="PNG", pnginfo=about, compress_level=3)
    return file.getvalue()
