"""RandAugment's operations on one image, in JAX, with the arithmetic of Pillow: the pixels that timm would give.

Eight operations are a table of 256 values per channel, two blend the image with another one, five move its pixels.
Wherever Pillow rounds, so does this, in whole numbers: they cannot depend on how a compiler orders and fuses
floating-point operations. For that, blend factors and shears are multiples of 1 / `ONE`, shifts of 1 / `PIXEL`. Only
angles, and what the bicubic filter sums up, are floating-point, so moved pixels may be one level off where a sum is
next to a whole number.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

ONE = 2**14  # the unit of factors: the products of one below 4 with what it is applied to are exact in float32
PIXEL = 2**10  # the unit of shifts: whole pixels are exact, and few sums of such parts are next to a whole number
FILL = (124, 116, 104)  # what is beyond the image: ImageNet's mean colour

Image = UInt8[Array, "height width 3"]
Table = UInt8[Array, "3 256"]
Number = Int[Array, ""]

_LEVELS = np.arange(256, dtype=np.int32)


def lookup(image: Image, table: Table) -> Image:
    """Each value replaced by its entry in its channel's table (Image.point)."""
    return jnp.stack([table[channel][image[..., channel]] for channel in range(3)], axis=-1)


def invert_table() -> Table:
    """ImageOps.invert."""
    return _alike(255 - _LEVELS)


def posterize_table(bits: Number) -> Table:
    """ImageOps.posterize: the highest bits of each value. Of 0 bits, black remains."""
    return _alike(_LEVELS & ~(2 ** (8 - bits) - 1))


def solarize_table(threshold: Number) -> Table:
    """ImageOps.solarize: values from a threshold on inverted."""
    return _alike(jnp.where(threshold > _LEVELS, _LEVELS, 255 - _LEVELS))


def solarize_add_table(addend: Number) -> Table:
    """timm's `solarize_add`: the darker half of the values made brighter."""
    return _alike(jnp.where(_LEVELS < 128, jnp.minimum(255, _LEVELS + addend), _LEVELS))


def brightness_table(factor: Number) -> Table:
    """ImageEnhance.Brightness: blended with black."""
    return _alike(blend(jnp.zeros(256, jnp.uint8), _LEVELS, factor))


def contrast_table(image: Image, factor: Number) -> Table:
    """ImageEnhance.Contrast: blended with the mean of the grey image."""
    values = grey(image).astype(jnp.int32)
    mean = (2 * jnp.sum(values) + values.size) // (2 * values.size)
    return _alike(blend(mean, _LEVELS, factor))


def autocontrast_table(image: Image) -> Table:
    """ImageOps.autocontrast: each channel stretched to the whole range."""
    low = jnp.min(image, axis=(0, 1)).astype(jnp.int32)[:, None]
    high = jnp.max(image, axis=(0, 1)).astype(jnp.int32)[:, None]
    stretched = (_LEVELS - low) * 255 // jnp.maximum(high - low, 1)
    lost = jnp.unpackbits(jnp.asarray(_autocontrast_losses())[low[:, 0], high[:, 0]], axis=-1)
    table = jnp.where(high > low, jnp.clip(stretched - lost, 0, 255), _LEVELS)
    return table.astype(jnp.uint8)


@functools.cache
def _autocontrast_losses() -> UInt8[np.ndarray, "256 256 32"]:
    """By lowest and highest value, a bit for each value that Pillow's stretching in float64 takes to one level less.

    Where the quotient is a whole number, Pillow's sum of two rounded products may fall just short of it. No device
    computes in float64 alike, if at all, so it is done here for all there is.
    """
    values = np.arange(256.0)
    losses = np.zeros((256, 256, 32), np.uint8)
    for low in range(256):
        high = np.arange(low + 1, 256)[:, None]
        scale = 255.0 / (high - low)
        pillows = (values * scale + -low * scale).astype(np.int32)
        exact = (_LEVELS - low) * 255 // (high - low)
        inside = (values >= low) & (values <= high)
        losses[low, low + 1 :] = np.packbits(inside & (pillows < exact), axis=-1)
    return losses


def equalize_table(image: Image) -> Table:
    """ImageOps.equalize: each channel's values spread evenly."""
    histogram = jnp.stack([jnp.bincount(image[..., channel].ravel(), length=256) for channel in range(3)])
    highest = jnp.max(image, axis=(0, 1)).astype(jnp.int32)[:, None]
    # a channel of one value, and one with few others than its highest, stay as they are: Pillow's step is 0
    step = (image.shape[0] * image.shape[1] - jnp.take_along_axis(histogram, highest, axis=1)) // 255
    below = jnp.cumsum(histogram, axis=1) - histogram
    table = jnp.where(step > 0, jnp.minimum(255, (step // 2 + below) // jnp.maximum(step, 1)), _LEVELS)
    return table.astype(jnp.uint8)


def grey(image: Image) -> UInt8[Array, "height width"]:
    """Image.convert("L")."""
    red, green, blue = jnp.moveaxis(image.astype(jnp.int32), -1, 0)
    return ((red * 19595 + green * 38470 + blue * 7471 + 2**15) >> 16).astype(jnp.uint8)


def smooth(image: Image) -> Image:
    """ImageFilter.SMOOTH: each value's mean with its eight neighbours, itself five times. The border stays."""
    values = image.astype(jnp.int32)
    rows = values[:-2] + values[1:-1] + values[2:]
    total = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * values[1:-1, 1:-1]
    # Pillow sums up thirteenths in float32 and rounds; there is no half among them, so that this is the same
    return image.at[1:-1, 1:-1].set(((2 * total + 13) // 26).astype(jnp.uint8))


def blend(one: Int[Array, "..."], other: Int[Array, "..."], factor: Number) -> UInt8[Array, "..."]:
    """Image.blend: from one (0) over the other (`ONE`) to beyond it; fractions are cut off."""
    one, other = jnp.asarray(one, jnp.int32), jnp.asarray(other, jnp.int32)
    return jnp.clip((one * ONE + factor * (other - one)) >> 14, 0, 255).astype(jnp.uint8)


def move(image: Image, *, degrees: Float[Array, ""], shear: Int[Array, "2"], shift: Int[Array, "2"]) -> Image:
    """Image.rotate, or Image.transform for one of timm's shears or shifts, bicubic, with `FILL`. The others are by 0.

    Args:
        degrees: to turn, counter-clockwise around the centre.
        shear: how far down for each column, and right for each row, pixels are taken from, in units of 1 / `ONE`.
        shift: how far down and right, in units of 1 / `PIXEL`.
    """
    height, width, _ = image.shape
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)
    # distances from each pixel to where it is taken from, not positions: they leave float32 more digits
    down_centre, right_centre = rows - (height - 1) / 2, columns - (width - 1) / 2
    radians = degrees * (np.pi / 180)
    sine, less = jnp.sin(radians), -2 * jnp.sin(radians / 2) ** 2  # cos - 1, without its cancellation
    down, right = less * down_centre + sine * right_centre, less * right_centre - sine * down_centre
    half_columns, half_rows = 2 * columns + 1, 2 * rows + 1  # from the edge to the centres
    rows, below = _source(rows, down, shear[0] * half_columns, shift[0])
    columns, behind = _source(columns, right, shear[1] * half_rows, shift[1])
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    row_step, column_step = jnp.where(below < 0, -1, 1), jnp.where(behind < 0, -1, 1)
    pixels = image.reshape(-1, 3)

    def pixel(row: int, column: int) -> Int[Array, "height width 3"]:
        place = jnp.clip(rows + row * row_step, 0, height - 1) * width
        place += jnp.clip(columns + column * column_step, 0, width - 1)
        return pixels.at[place].get(mode="promise_in_bounds").astype(jnp.int32)

    # A polynomial of both distances, with whole numbers as coefficients, is added to the nearest pixel. Where little is
    # added, and the sum may be next to a whole number, float32 then has the most digits.
    near, reached = pixel(0, 0), (-1, 0, 1, 2)
    down_columns = [_cubic(*(pixel(row, column) - near for row in reached)) for column in reached]
    across = [
        _value(*(x.astype(jnp.float32) for x in _cubic(*coefficients)), jnp.abs(behind)[..., None])
        for coefficients in zip(*down_columns, strict=True)
    ]
    difference = jnp.floor(_value(*across, jnp.abs(below)[..., None])).astype(jnp.int32)
    moved = jnp.clip(near + difference, 0, 255).astype(jnp.uint8)
    return jnp.where(inside[..., None], moved, jnp.array(FILL, jnp.uint8))


def _alike(values: Int[Array, "256"]) -> Table:
    return jnp.broadcast_to(jnp.asarray(values).astype(jnp.uint8), (3, 256))


def _source(places: Array, distance: Array, shear: Array, shift: Number) -> tuple[Array, Array]:
    """The pixel nearest to where a distance leads from each place, and how far behind that pixel it leads.

    A shear, in units of 1 / (2 `ONE`), and a shift come on top.
    """
    unit = 2 * ONE
    exact = shear + shift * (unit // PIXEL)
    distance = distance + (exact % unit).astype(jnp.float32) / unit
    nearest = jnp.floor(distance + 0.5)
    return places + exact // unit + nearest.astype(jnp.int32), distance - nearest


def _cubic(before: Array, at: Array, after: Array, behind: Array) -> tuple[Array, Array, Array, Array]:
    """Pillow's cubic (a = -1) between `at` and `after`: the coefficients of the share's powers, from 0 to 3."""
    return at, after - before, 2 * (before - at) + after - behind, at - before - after + behind


def _value(constant: Array, slope: Array, bend: Array, twist: Array, share: Array) -> Array:
    return constant + share * (slope + share * (bend + share * twist))
