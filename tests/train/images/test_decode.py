"""Images of every kind have the right pixels, and files that are none are refused in one line."""

import io
import pickle
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from crossvit_jax.preprocess import UnreadableImage, decode_image, orientation
from train.images.decode import decode_pixels

_RNG = np.random.default_rng(0)
_COLOUR = _RNG.integers(0, 256, (6, 5, 3), dtype=np.uint8)
_GREY = _COLOUR[..., 0]
_ALPHA = _COLOUR[..., 1]


def _file(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def _pixels(encoded):
    image = decode_image(encoded, "some")
    assert image.mode == "RGB"
    np.testing.assert_array_equal(decode_pixels(encoded, "some"), image)
    return np.asarray(image)


def _thrice(grey):
    return np.repeat(np.asarray(grey)[..., None], 3, axis=-1)


def _png(depth, colour_type, rows):
    """A PNG file as Pillow cannot write it, of big-endian rows."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = rows.shape[:2]
    head = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


# --- kinds of images ---


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM"])
def test_colour_and_grey(format):
    np.testing.assert_array_equal(_pixels(_file(Image.fromarray(_COLOUR), format)), _COLOUR)
    np.testing.assert_array_equal(_pixels(_file(Image.fromarray(_GREY), format)), _thrice(_GREY))


def test_black_and_white():
    bits = _GREY > 127
    np.testing.assert_array_equal(_pixels(_file(Image.fromarray(bits))), _thrice(bits * np.uint8(255)))


@pytest.mark.filterwarnings("ignore:Palette images")  # pytest undoes the filter of crossvit_jax.preprocess
@pytest.mark.parametrize(
    "transparency", [None, 1, bytes([0, 128, 255, 7])], ids=["opaque", "one colour", "each colour"]
)
@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_palettes_give_their_colours_whatever_is_transparent(format, transparency):
    if format == "GIF" and isinstance(transparency, bytes):
        transparency = 3
    palette, indices = _COLOUR[0, :4], _GREY % 4
    image = Image.fromarray(indices, "L")
    image.putpalette(palette.tobytes())
    options = {} if transparency is None else {"transparency": transparency}
    np.testing.assert_array_equal(_pixels(_file(image, format, **options)), palette[indices])


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_transparency_is_dropped(format):
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    colour = Image.fromarray(np.dstack([_COLOUR, _ALPHA]), "RGBA")
    np.testing.assert_array_equal(_pixels(_file(colour, format, **options)), _COLOUR)
    if format != "WEBP":
        grey = Image.fromarray(np.dstack([_GREY, _ALPHA]), "LA")
        np.testing.assert_array_equal(_pixels(_file(grey, format)), _thrice(_GREY))


def test_a_transparent_colour_of_a_colour_or_grey_image_stays():
    encoded = _file(Image.fromarray(_COLOUR), transparency=tuple(_COLOUR[0, 0].tolist()))
    np.testing.assert_array_equal(_pixels(encoded), _COLOUR)
    np.testing.assert_array_equal(_pixels(_file(Image.fromarray(_GREY), transparency=int(_GREY[0, 0]))), _thrice(_GREY))


@pytest.mark.parametrize("format", ["TIFF", "JPEG"])
def test_cmyk_is_ink_on_white(format):
    ink = np.array([[0, 0, 0, 0], [255, 0, 0, 0], [0, 255, 255, 0], [0, 0, 0, 255], [40, 90, 200, 10]], np.uint8)
    cyan_magenta_yellow, black = ink[:, :3].astype(float), ink[:, 3:].astype(float)
    expected = (255 - cyan_magenta_yellow) * (255 - black) / 255
    image = Image.fromarray(np.tile(ink[:, None, None], (1, 16, 16, 1)).reshape(80, 16, 4), "CMYK")
    options = {"quality": 100, "subsampling": 0} if format == "JPEG" else {}
    pixels = _pixels(_file(image, format, **options)).reshape(5, 16, 16, 3)
    np.testing.assert_allclose(pixels, np.broadcast_to(expected[:, None, None], pixels.shape), atol=4)


@pytest.mark.parametrize("options", [{"progressive": True}, {"exif": True}, {"restart_marker_blocks": 2}], ids=list)
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("size", [(427, 640), (33, 17), (1, 1)])
def test_jpeg_files_of_all_kinds_have_pillows_pixels(photographs, size, subsampling, options):
    """Those that are not left to Pillow: a turned one too, which stays as it is stored."""
    if "exif" in options:
        exif = Image.Exif()
        exif[0x0112] = 6
        options = {"exif": exif}
    for image in (photographs[0].resize(size[::-1]), photographs[1].resize(size[::-1]).convert("L")):
        kind = {"subsampling": subsampling} if image.mode == "RGB" else {}
        encoded = _file(image, "JPEG", quality=85, **kind, **options)
        assert _pixels(encoded).shape == (*size, 3)
        np.testing.assert_array_equal(_pixels(encoded + b"more"), _pixels(encoded))


# --- EXIF orientations ---


def _tagged(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return {"exif": exif}


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
@pytest.mark.parametrize("value", range(1, 9))
def test_apply_turns_images_as_pillow_does_and_keep_leaves_them(photographs, value, format):
    for mode in ("RGB", "L", "CMYK") if format == "JPEG" else ("RGB",):
        encoded = _file(photographs[0].resize((45, 30)).convert(mode), format, **_tagged(value))
        with Image.open(io.BytesIO(encoded)) as opened:
            expected = ImageOps.exif_transpose(opened).convert("RGB")
        assert expected.size == ((45, 30) if value < 5 else (30, 45))
        np.testing.assert_array_equal(decode_image(encoded, "", exif="apply"), expected)
        np.testing.assert_array_equal(decode_pixels(encoded, "", "apply"), expected)
        with Image.open(io.BytesIO(encoded)) as opened:
            np.testing.assert_array_equal(_pixels(encoded), opened.convert("RGB"))
        # TIFF files are turned by Pillow in any case
        assert orientation(encoded) == (1 if format == "TIFF" else value)


@pytest.mark.parametrize("value", [2, 3, 4, 5, 6, 7, 8])
def test_a_turned_image_is_the_upright_one(value):
    """Row 0 and column 0 of what is stored are at these sides of what is seen, by the EXIF standard."""
    row, column = {
        2: ("top", "right"),
        3: ("bottom", "right"),
        4: ("bottom", "left"),
        5: ("left", "top"),
        6: ("right", "top"),
        7: ("right", "bottom"),
        8: ("left", "bottom"),
    }[value]
    turned = np.asarray(decode_image(_file(Image.fromarray(_COLOUR), **_tagged(value)), "", exif="apply"))
    sides = {"top": turned[0], "bottom": turned[-1], "left": turned[:, 0], "right": turned[:, -1]}
    for side, stored in ((row, _COLOUR[0]), (column, _COLOUR[:, 0])):
        assert sorted(map(tuple, sides[side])) == sorted(map(tuple, stored))


def test_orientations_in_xmp_data_count_and_damaged_ones_do_not():
    plain = Image.fromarray(_COLOUR)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="8"/></x:xmpmeta>'
    encoded = _file(plain, "JPEG", xmp=xmp)
    assert orientation(encoded) == 8
    with Image.open(io.BytesIO(encoded)) as opened:
        expected = ImageOps.exif_transpose(opened)
    np.testing.assert_array_equal(decode_pixels(encoded, "", "apply"), expected)
    for exif in (_tagged(9), _tagged(0), {"exif": b"Exif\0\0MM\0*\0\0\0\x08\xff"}, {"exif": b"Exif\0\0nonsense"}):
        for format in ("JPEG", "PNG"):
            encoded = _file(plain, format, **exif)
            assert orientation(encoded) == 1
            np.testing.assert_array_equal(decode_pixels(encoded, "", "apply"), _pixels(encoded))
    assert orientation(b"") == orientation(b"Exif") == 1


_DEEP = np.array([[0, 255, 256, 1000], [0x7FFF, 0x8000, 0xFF00, 0xFFFF]], np.uint16)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_and_not_cut_off(format):
    np.testing.assert_array_equal(_pixels(_file(Image.fromarray(_DEEP), format)), _thrice(_DEEP >> 8))


def test_16_bit_grey_of_the_other_byte_order_and_in_32_bits():
    swapped = Image.frombytes("I;16B", (4, 2), _DEEP.astype(">u2").tobytes())
    np.testing.assert_array_equal(_pixels(_file(swapped, "TIFF")), _thrice(_DEEP >> 8))
    wide = Image.fromarray(_DEEP.astype(np.int32))
    np.testing.assert_array_equal(_pixels(_file(wide, "TIFF")), _thrice(_DEEP >> 8))


@pytest.mark.parametrize(("colour_type", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_16_bit_png_files_of_all_kinds_give_the_high_bytes(colour_type, channels):
    values = _RNG.integers(0, 2**16, (6, 5, channels)).astype(">u2")
    colours = values[..., :3] if channels > 2 else np.repeat(values[..., :1], 3, axis=-1)
    np.testing.assert_array_equal(_pixels(_png(16, colour_type, values)), colours >> 8)


_PRINTING = """
import sys
import numpy as np
from PIL import Image
from crossvit_jax.preprocess import decode_image
Image.MAX_IMAGE_PIXELS = 20  # so that 30 are many, as 90 million would be
for path in sys.argv[1:]:
    with open(path, "rb") as file:
        print(decode_image(file.read(), path).size)
"""


def test_nothing_is_printed_about_odd_images(tmp_path):
    palette = Image.fromarray(_GREY % 4, "L")
    palette.putpalette(_COLOUR[0, :4].tobytes())
    exif = b"Exif\0\0" + b"II*\0\x08\0\0\0\x09\0" + bytes(40)  # more entries promised than there are
    files = {
        "palette.png": _file(palette, transparency=bytes([0, 128, 255, 7])),
        "large.png": _file(Image.fromarray(_COLOUR)),
        "exif.jpeg": _file(Image.fromarray(_COLOUR), "JPEG", exif=exif),
    }
    for name, encoded in files.items():
        (tmp_path / name).write_bytes(encoded)
    command = [sys.executable, "-W", "always", "-c", _PRINTING, *(str(tmp_path / name) for name in files)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["(5, 6)"] * 3
    assert done.stderr == ""


# --- what is no image ---


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        (b"", "it is empty"),
        (b"<html>not found</html>", "it is in no image format that is read"),
        (_file(Image.fromarray(_COLOUR))[:60], "truncated"),
        (_file(Image.new("RGB", (64, 64)), "JPEG")[:-60], "truncated"),
        (_file(Image.fromarray(_GREY / np.float32(255)), "TIFF"), "floating-point pixels have no known range"),
        (_file(Image.fromarray(_DEEP.astype(np.int32) << 8), "TIFF"), "32-bit pixels have no known range"),
        (_file(Image.new("1", (20000, 20000))), "at most 178,956,970 in all are read"),
    ],
    ids=["empty", "text", "half a PNG", "half a JPEG", "float", "32 bits", "huge"],
)
def test_an_unreadable_image_is_named_with_the_reason(encoded, reason):
    with pytest.raises(UnreadableImage) as error:
        decode_image(encoded, "cat/1.png")
    assert str(error.value).startswith("cannot read image cat/1.png: ")
    assert reason in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(UnreadableImage) as same:
        decode_pixels(encoded, "cat/1.png")
    assert str(same.value) == str(error.value)
    again = pickle.loads(pickle.dumps(error.value))  # as it comes out of a worker
    assert (str(again), again.name, again.reason) == (str(error.value), "cat/1.png", error.value.reason)


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_byte_anywhere_is_read_over_or_refused():
    """Pillow raises all kinds of errors over them, even TypeError: nothing but UnreadableImage gets through."""
    refused = 0
    for format in ("PNG", "JPEG", "GIF", "BMP", "PPM", "TIFF"):
        whole = _file(Image.fromarray(_COLOUR), format)
        for place in range(len(whole)):
            for value in (0, 2, 12, 255):
                damaged = whole[:place] + bytes([value]) + whole[place + 1 :]
                try:
                    image = decode_image(damaged, "")
                except UnreadableImage:
                    refused += 1
                    if format == "JPEG":  # the others are left to Pillow
                        with pytest.raises(UnreadableImage):
                            decode_pixels(damaged, "")
                else:
                    if format == "JPEG":
                        np.testing.assert_array_equal(decode_pixels(damaged, ""), image)
    assert refused > 500
