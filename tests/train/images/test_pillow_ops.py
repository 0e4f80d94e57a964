"""Each of RandAugment's operations on the device gives what Pillow gives: on real photographs, at every strength."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from tests.compilation import AS_FOR_USERS
from tests.train.images.timm_operations import by_timm
from train.images import pillow_ops
from train.images.augment import FINENESS, OPERATIONS, Draws, _by_moving, augment

_LEVELS = (0, 1, 3000, 5 * FINENESS, 9 * FINENESS, 9 * FINENESS + 333, 10 * FINENESS)
_SIGNS = (False, True)
_MOVING = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")


@pytest.fixture(scope="module")
def crops(photographs):
    """Real pixels, neither square nor of the whole range: dark, pale, and with clipped highlights and shadows."""
    temple, flower = (np.asarray(photo.crop((200, 120, 304, 216))).astype(float) for photo in photographs)
    return [pixels.clip(0, 255).astype(np.uint8) for pixels in (temple, flower / 3, flower / 2 + 90, temple * 2 - 90)]


@pytest.fixture(scope="module", params=[True, False], ids=["increasing", "not increasing"])
def augmented(request, crops):
    """Whether the stronger kind is asked for, and what the device makes: by operation, level, sign and crop."""
    increasing = request.param
    cases = list(itertools.product(range(len(OPERATIONS)), _LEVELS, _SIGNS, crops))
    operations, levels, signs, images = (np.array(column) for column in zip(*cases, strict=True))
    draws = Draws(
        flip=np.zeros(len(cases), bool),
        operations=operations[:, None],
        applied=np.ones((len(cases), 1), bool),
        levels=levels[:, None].astype(np.int32),
        negative=signs[:, None],
        box=np.zeros((len(cases), 4), np.int32),
        noise=jax.random.split(jax.random.key(0), len(cases)),
    )
    function = jax.jit(functools.partial(augment, increasing=increasing), compiler_options=AS_FOR_USERS)
    pixels = function(images, jax.tree.map(jnp.asarray, draws))
    pixels = np.rint((np.asarray(pixels) * IMAGENET_DEFAULT_STD + IMAGENET_DEFAULT_MEAN) * 255).astype(int)
    return increasing, pixels.reshape(len(OPERATIONS), len(_LEVELS), 2, *np.shape(crops))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_gives_the_pixels_of_pillow(operation, augmented, crops):
    increasing, ours = augmented
    expected = [
        by_timm(Image.fromarray(crop), operation, level, negative=negative, increasing=increasing)
        for level, negative, crop in itertools.product(_LEVELS, _SIGNS, crops)
    ]
    expected = np.stack([np.asarray(image) for image in expected]).astype(int)
    off = np.abs(expected - ours[OPERATIONS.index(operation)].reshape(expected.shape))
    if operation in _MOVING:
        assert off.max() <= 1
        assert np.mean(off > 0) < 1e-4
    else:
        assert off.max() == 0
    different = np.mean(expected != np.tile(crops, (len(_LEVELS) * 2, 1, 1, 1)))
    assert different > 0.1  # something was done


# 1, 8 and 9 shear and shift by fractions of which many sums are whole; 2.5, 5 and 10 shift by whole pixels
@pytest.mark.parametrize("level", [0, 50, 1024, 2560, 5120, 8 * FINENESS, 9 * FINENESS, 9549, 10 * FINENESS])
def test_photographs_are_moved_as_by_pillow_at_every_strength(level, photographs, moved):
    """By the program as it is compiled by default."""
    for operation, negative in itertools.product(_MOVING, _SIGNS):
        off = []
        for photograph in photographs:
            crop = photograph.crop((200, 100, 440, 340))
            expected = np.asarray(by_timm(crop, operation, level, negative=negative)).astype(int)
            ours = moved(np.asarray(crop), OPERATIONS.index(operation), level, -1 if negative else 1)
            off.append(np.abs(ours - expected))
        assert np.max(off) <= 1
        assert np.mean(np.array(off) > 0, axis=(1, 2, 3)).max() < 1e-4, operation
        if operation.startswith("Translate") and level % 2560 == 0:
            assert np.max(off) == 0


@pytest.fixture
def moved():
    """The device's part of the moving operations."""
    return jax.jit(_by_moving, compiler_options=AS_FOR_USERS)


def test_contrast_is_stretched_as_pillow_does_where_its_sums_fall_short():
    """A whole quotient comes out one lower for some ranges of values; 255 is then stretched to 254."""
    ranges = [(low, high) for low, high in itertools.combinations(range(256), 2) if (low * 7 + high) % 23 == 0]
    ramps = np.array([np.arange(256).clip(low, high) for low, high in ranges], np.uint8)
    images = np.repeat(ramps[:, None, :, None], 3, axis=-1)
    tables = np.asarray(jax.jit(jax.vmap(pillow_ops.autocontrast_table))(images))
    short = 0
    for (low, high), image, table in zip(ranges, images, tables, strict=True):
        stretched = np.asarray(ImageOps.autocontrast(Image.fromarray(image)))[0, low : high + 1, 0]
        np.testing.assert_array_equal(table[0, low : high + 1], stretched)
        short += stretched[-1] == 254
    assert short > 10


@pytest.mark.parametrize("kinds", [1, 2, 3, 200])
def test_images_of_few_values_are_equalised_and_stretched_as_in_pillow(kinds):
    rng = np.random.default_rng(kinds)
    image = rng.choice(256, kinds, replace=False)[rng.integers(0, kinds, (40, 30, 3))].astype(np.uint8)
    for table, operation in (
        (pillow_ops.equalize_table, ImageOps.equalize),
        (pillow_ops.autocontrast_table, ImageOps.autocontrast),
    ):
        ours = pillow_ops.lookup(image, table(jnp.asarray(image)))
        np.testing.assert_array_equal(ours, operation(Image.fromarray(image)))


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (3, 3)])
def test_the_smallest_images_are_moved_and_smoothed_too(size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    kernel = Image.fromarray(image).filter(ImageFilter.SMOOTH)
    np.testing.assert_array_equal(pillow_ops.smooth(jnp.asarray(image)), kernel)
    right = jnp.array([0, pillow_ops.ONE // 4])
    moved = pillow_ops.move(jnp.asarray(image), degrees=jnp.float32(0), shear=right, shift=jnp.zeros_like(right))
    coefficients = (1, 0.25, 0, 0, 1, 0)
    expected = Image.fromarray(image).transform(
        size[::-1], Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC, fillcolor=pillow_ops.FILL
    )
    np.testing.assert_array_equal(moved, expected)
