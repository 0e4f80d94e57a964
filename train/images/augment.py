"""Augmentation on the device: what timm does to a crop, for a whole batch of them, in a jitted function of its own.

Flips, RandAugment, normalisation and random erasing; reading, decoding and cropping stay with the workers. What is
drawn for an image (`draw`) is apart from what is done with it: with the same draws the pixels are those of timm and
Pillow.
An image's draws follow from the seed, the step and its place in the batch, on any number of devices.

Most images need none of the costly operations, so each is done for those that need it, a few at a time.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float32, Int, Key, UInt8

from train.config import TrainConfig
from train.devices.mesh import AXES, batch_sharding, replicated
from train.devices.normalise import normalise
from train.images import pillow_ops
from train.images.pillow_ops import ONE
from train.images.rand_augment import parse_rand_augment

# timm's order, each kind together: those by table, those that blend, those that move pixels
OPERATIONS = (
    *("AutoContrast", "Equalize", "Invert", "Posterize", "Solarize", "SolarizeAdd", "Contrast", "Brightness"),
    *("Color", "Sharpness"),
    *("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"),
)
FINENESS = 1024  # levels in a unit of timm's magnitude: whole numbers, so that what follows from them is exact
_HIGHEST = 10 * FINENESS
_BLENDS, _MOVES = OPERATIONS.index("Color"), OPERATIONS.index("Rotate")

_ERASED_AREA, _ERASED_ASPECT, _ERASE_TRIES = (0.02, 1 / 3), 0.3, 10  # the aspect goes up to the inverse, too
_SHARES = 1 + 3 + 2 * _ERASE_TRIES  # numbers between 0 and 1 that an image needs, besides those of its layers
_AT_A_TIME = 16  # images: enough to keep a GPU busy, few enough to leave most of a batch out


class Draws(NamedTuple):
    """What was drawn for an image, or for a batch of them."""

    flip: Bool[Array, "*batch"]
    operations: Int[Array, "*batch layers"]  # places in OPERATIONS
    applied: Bool[Array, "*batch layers"]
    levels: Int[Array, "*batch layers"]  # magnitudes, in units of 1 / FINENESS
    negative: Bool[Array, "*batch layers"]  # the direction, of operations that have two
    box: Int[Array, "*batch 4"]  # top, bottom, left, right of what is erased; lower ends inclusive
    noise: Key[Array, "*batch"]  # decides what is there instead
    vertical: Bool[Array, "*batch"] | None = None  # flipped so; none: nothing was drawn for it


def draw(key: Key[Array, ""], config: TrainConfig, size: tuple[int, int]) -> Draws:
    """Draw for one image, with the distributions of timm's `RandAugment`, `AugmentOp` and `RandomErasing`."""
    policy = parse_rand_augment(config.auto_augment)
    layers = policy.layers
    uniform, normal, noise = jax.random.split(key, 3)
    # all at once, and then dealt out: every call of a generator takes the compiler half a second
    shares = jax.random.uniform(uniform, (_SHARES + 3 * layers,))
    (flip, *box), (operations, applied, negative) = shares[:_SHARES], shares[_SHARES:].reshape(3, layers)
    magnitudes = policy.magnitude + policy.noise * jax.random.normal(normal, (layers,))
    # of a key of its own, so that recipes without it draw what they always drew
    vertical = jax.random.bernoulli(jax.random.fold_in(noise, 0), config.vflip) if config.vflip else None
    return Draws(
        flip=flip < config.hflip,
        operations=_whole(operations, len(OPERATIONS)),
        applied=applied < policy.prob,
        levels=jnp.round(jnp.clip(magnitudes, 0, 10) * FINENESS).astype(jnp.int32),
        negative=negative < 0.5,
        box=_draw_box(jnp.stack(box), config.erase_prob, size),
        noise=noise,
        vertical=vertical,
    )


def draw_batch(config: TrainConfig, step: Int[Array, ""], places: Int[Array, " batch"], size: tuple[int, int]) -> Draws:
    """What `draw` gives for the images at some places of the batch of a step."""
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    return jax.vmap(lambda place: draw(jax.random.fold_in(key, place), config, size))(places)


def _draw_box(shares: Float32[Array, " shares"], prob: float, size: tuple[int, int]) -> Int[Array, "4"]:
    """timm's `RandomErasing._erase`: of ten boxes the first that is smaller than the image. An empty one for none."""
    height, width = size
    erased, top, left = shares[:3]
    areas, aspects = shares[3:].reshape(2, _ERASE_TRIES)
    areas = (_ERASED_AREA[0] + areas * (_ERASED_AREA[1] - _ERASED_AREA[0])) * (height * width)
    aspects = jnp.exp(np.log(_ERASED_ASPECT) * (1 - 2 * aspects))
    heights = jnp.round(jnp.sqrt(areas * aspects)).astype(jnp.int32)
    widths = jnp.round(jnp.sqrt(areas / aspects)).astype(jnp.int32)
    fits = (heights < height) & (widths < width)
    first = jnp.argmax(fits)
    box_height, box_width = heights[first], widths[first]
    top, left = _whole(top, height - box_height + 1), _whole(left, width - box_width + 1)
    box = jnp.stack([top, top + box_height, left, left + box_width])
    return jnp.where((erased < prob) & fits[first], box, 0)


def _whole(share: Float32[Array, "..."], kinds: int | Array) -> Int[Array, "..."]:
    """Uniform numbers in [0, 1) as uniform integers in [0, kinds)."""
    return jnp.minimum(jnp.floor(share * kinds).astype(jnp.int32), kinds - 1)  # a product may be rounded up


def augment(
    images: UInt8[Array, "batch height width 3"], draws: Draws, *, increasing: bool
) -> Float32[Array, "batch height width 3"]:
    """What timm makes of crops, with given draws: flipped, augmented, normalised, erased."""
    images = jnp.where(draws.flip[:, None, None, None], images[:, :, ::-1], images)
    if draws.vertical is not None:
        images = jnp.where(draws.vertical[:, None, None, None], images[:, ::-1], images)
    by_table, by_blend = (functools.partial(function, increasing=increasing) for function in (_by_table, _by_blend))

    def layer(images: Array, drawn: tuple[Array, Array, Array, Array]) -> tuple[Array, None]:
        operation, applied, level, negative = drawn
        arguments = operation, level, jnp.where(negative, -1, 1)
        blends, moves = operation >= _BLENDS, operation >= _MOVES
        images = _where(applied & ~blends, by_table, images, arguments)
        images = _where(applied & blends & ~moves, by_blend, images, arguments)
        images = _where(applied & moves, _by_moving, images, arguments)
        return images, None

    drawn = (draws.operations, draws.applied, draws.levels, draws.negative)
    images, _ = jax.lax.scan(layer, images, jax.tree.map(jnp.transpose, drawn))
    return _where(draws.box[:, 1] > 0, _erase, normalise(images), (draws.box, draws.noise))


def _where(needed: Bool[Array, " batch"], function: Callable, images: Array, arguments: Any) -> Array:
    """The images with a function of them, and of the arguments that belong to each, applied where it is needed."""
    batch = len(images)
    chunk = min(batch, _AT_A_TIME)
    first_needed = jnp.argsort(~needed)  # stable
    count = jnp.sum(needed)

    def some(number: Array, images: Array) -> Array:
        places = number * chunk + jnp.arange(chunk)
        chosen = first_needed[jnp.minimum(places, batch - 1)]
        done = jax.vmap(function)(images[chosen], *(argument[chosen] for argument in arguments))
        # a last chunk that is not full writes the rest nowhere
        return images.at[jnp.where(places < count, chosen, batch)].set(done, mode="drop")

    return jax.lax.fori_loop(0, (count + chunk - 1) // chunk, some, images)


def _by_table(image: Array, operation: Array, level: Array, sign: Array, *, increasing: bool) -> Array:
    """The first eight operations, with timm's `LEVEL_TO_ARG`."""
    posterize, solarize = level * 4 // _HIGHEST, level * 256 // _HIGHEST
    factor = _factor(level, sign, increasing)
    tables = [
        pillow_ops.autocontrast_table(image),
        pillow_ops.equalize_table(image),
        pillow_ops.invert_table(),
        pillow_ops.posterize_table(4 - posterize if increasing else posterize),
        pillow_ops.solarize_table(256 - solarize if increasing else solarize),
        pillow_ops.solarize_add_table(level * 110 // _HIGHEST),
        pillow_ops.contrast_table(image, factor),
        pillow_ops.brightness_table(factor),
    ]
    return pillow_ops.lookup(image, jnp.stack(tables)[operation])


def _by_blend(image: Array, operation: Array, level: Array, sign: Array, *, increasing: bool) -> Array:
    """Colour and sharpness: a blend of the image's grey, or smoothed, self with itself."""
    grey = jnp.broadcast_to(pillow_ops.grey(image)[..., None], image.shape)
    other = jnp.where(operation == _BLENDS, grey, pillow_ops.smooth(image))
    return pillow_ops.blend(other, image, _factor(level, sign, increasing))


def _by_moving(image: Array, operation: Array, level: Array, sign: Array) -> Array:
    """Rotation, shears and shifts: by up to 30 degrees, 0.3, and 0.45 of the size."""
    height, width, _ = image.shape
    levels = sign * jnp.where(np.arange(_MOVES, len(OPERATIONS)) == operation, level, 0)
    rotate, shear_x, shear_y, shift_x, shift_y = levels
    shear = _in_units(0.3 * jnp.stack([shear_y, shear_x]) / _HIGHEST)
    unit = 20 * _HIGHEST // pillow_ops.PIXEL  # 0.45 is 9 / 20; in whole numbers, so that whole pixels come out
    shift = (9 * jnp.stack([height * shift_y, width * shift_x]) + unit // 2) // unit
    return pillow_ops.move(image, degrees=30 * rotate / _HIGHEST, shear=shear, shift=shift)


def _factor(level: Array, sign: Array, increasing: bool) -> Array:
    """How much of the image itself is in a blend, in units of 1 / ONE: timm's `_enhance_level_to_arg`."""
    if increasing:
        return jnp.maximum(_in_units(0.1), _in_units(1 + sign * 0.9 * level / _HIGHEST))
    return _in_units(0.1 + 1.8 * level / _HIGHEST)


def _in_units(argument: Array) -> Array:
    return jnp.round(argument * ONE).astype(jnp.int32)


def _erase(pixels: Array, box: Array, noise: Array) -> Array:
    """A box of normal noise."""
    rows, columns = jnp.arange(pixels.shape[0])[:, None], jnp.arange(pixels.shape[1])
    inside = (rows >= box[0]) & (rows < box[1]) & (columns >= box[2]) & (columns < box[3])
    return jnp.where(inside[..., None], jax.random.normal(noise, pixels.shape), pixels)


def compile_augment(
    shape: tuple[int, int, int, int], config: TrainConfig, mesh: Mesh
) -> Callable[[UInt8[Array, "batch height width 3"], int], Float32[Array, "batch height width 3"]]:
    """The function (crops, step) -> the model's images, compiled for a mesh: each device augments its own."""
    increasing = parse_rand_augment(config.auto_augment).increasing

    def own(images: Array, step: Array) -> Array:
        places = jax.lax.axis_index(AXES) * len(images) + jnp.arange(len(images))
        draws = draw_batch(config, step, places, images.shape[1:3])
        return augment(images, draws, increasing=increasing)

    cut, shared = PartitionSpec(AXES), PartitionSpec()
    function = jax.jit(
        jax.shard_map(own, mesh=mesh, in_specs=(cut, shared), out_specs=cut),
        in_shardings=(batch_sharding(mesh), replicated(mesh)),
        out_shardings=batch_sharding(mesh),
    )
    return function.lower(jax.ShapeDtypeStruct(shape, jnp.uint8), 0).compile()
