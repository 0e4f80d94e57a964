"""Augmentation on the device: timm's pixels for the same draws, and draws that depend on seed, step and place only."""

import dataclasses
import functools
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import scipy.stats
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from tests.compilation import AS_FOR_USERS, xla_flags
from tests.train.images.timm_operations import by_timm
from train.devices.mesh import make_mesh
from train.images.augment import OPERATIONS, augment, compile_augment, draw_batch
from train.recipes import RECIPES

_SIZE = (60, 72)
_CONFIG = dataclasses.replace(RECIPES["imagenet"], seed=5)
_PLAIN = dataclasses.replace(_CONFIG, hflip=0.0, auto_augment="", erase_prob=0.0)


@pytest.fixture(scope="module")
def crops(photographs):
    """120 different parts of photographs."""
    height, width = _SIZE
    boxes = [(40 * (i % 12), 50 * (i // 12 % 5)) for i in range(60)]
    parts = [photo.crop((x, y, x + width, y + height)) for photo in photographs for x, y in boxes]
    return np.stack([np.asarray(part) for part in parts])


@pytest.fixture(scope="module")
def augmented(crops):
    """What was drawn for each crop, and what came of it."""
    draws = draw_batch(_CONFIG, 0, np.arange(len(crops)), _SIZE)
    function = jax.jit(functools.partial(augment, increasing=True), compiler_options=AS_FOR_USERS)
    return draws, np.asarray(function(crops, draws))


@functools.cache
def _compiled(config, batch_size):
    mesh = make_mesh(devices=jax.devices()[:1])
    return compile_augment((batch_size, *_SIZE, 3), config, mesh)


def _pixels(images):
    """Normalised images as the values that they were."""
    return np.rint((np.asarray(images) * IMAGENET_DEFAULT_STD + IMAGENET_DEFAULT_MEAN) * 255).astype(int)


def _by_timm(crop, draws):
    """A crop through timm's steps, up to the erasing, with the draws of the device."""
    image = Image.fromarray(crop)
    if draws.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for place, applied, level, negative in zip(
        draws.operations, draws.applied, draws.levels, draws.negative, strict=True
    ):
        if applied:
            image = by_timm(image, OPERATIONS[place], int(level), negative=bool(negative))
    return np.asarray(image).astype(int)


def test_the_same_draws_give_the_pixels_of_timm(crops, augmented):
    draws, images = augmented
    rows, columns = np.indices(_SIZE)
    off, kept = [], 0
    for i, (crop, image) in enumerate(zip(crops, images, strict=True)):
        drawn = jax.tree.map(lambda x, i=i: np.asarray(x[i]), draws._replace(noise=draws.box))
        top, bottom, left, right = drawn.box
        intact = (rows < top) | (rows >= bottom) | (columns < left) | (columns >= right)
        off.append(np.abs(_pixels(image) - _by_timm(crop, drawn))[intact].ravel())
        kept += intact.all()
    assert 60 < kept < 110  # a quarter is erased
    off = np.concatenate(off)
    assert np.mean(off > 0) < 1e-4


def test_what_is_erased_is_normal_noise_of_its_own_in_every_image(crops, augmented):
    draws, images = augmented
    noise = []
    for image, (top, bottom, left, right) in zip(images, np.asarray(draws.box), strict=True):
        if bottom:
            noise.append(image[top:bottom, left:right])
    assert len({patch[0, 0, 0] for patch in noise}) == len(noise) > 10
    values = np.concatenate([patch.reshape(-1, 3) for patch in noise])
    assert scipy.stats.kstest(values.ravel(), "norm").pvalue > 1e-3
    assert np.abs(np.corrcoef(values.T)[np.triu_indices(3, 1)]).max() < 0.05


def test_without_augmentation_the_crops_are_normalised(crops):
    images = _compiled(_PLAIN, 24)(crops[:24], 0)
    expected = (crops[:24] / np.float32(255) - np.float32(IMAGENET_DEFAULT_MEAN)) / np.float32(IMAGENET_DEFAULT_STD)
    np.testing.assert_allclose(images, expected, atol=1e-6)
    assert images.dtype == np.float32


def test_a_vertical_flip_is_drawn_beside_what_is_drawn_without_it(crops):
    config = dataclasses.replace(_CONFIG, vflip=0.3)
    plain, draws = (draw_batch(c, 0, np.arange(1000), _SIZE) for c in (_CONFIG, config))
    assert abs(np.mean(draws.vertical) - 0.3) < 0.05
    assert abs(np.corrcoef(draws.vertical, draws.flip)[0, 1]) < 0.1
    for name in ("flip", "operations", "applied", "levels", "negative", "box"):
        np.testing.assert_array_equal(getattr(draws, name), getattr(plain, name))
    images = _compiled(dataclasses.replace(_PLAIN, vflip=1.0), 24)(crops[:24], 0)
    np.testing.assert_array_equal(_pixels(images), crops[:24, ::-1])


def test_an_image_depends_on_seed_step_and_place_only(crops):
    step = _compiled(_CONFIG, 24)
    first = np.asarray(step(crops[:24], 3))
    np.testing.assert_array_equal(first, step(crops[:24], 3))
    others = np.concatenate([crops[24:47], crops[23:24]])
    np.testing.assert_array_equal(first[23], np.asarray(step(others, 3))[23])
    assert (first != np.asarray(step(crops[:24], 4))).any(axis=(1, 2, 3)).mean() > 0.8
    same = np.asarray(step(np.tile(crops[:1], (24, 1, 1, 1)), 3))
    assert len({image.tobytes() for image in same}) > 18  # each place draws for itself


_ON_DEVICES = """
import sys
import jax, numpy as np
from train.images.augment import compile_augment
from train.cost.hlo import communication
from train.recipes import RECIPES
from train.devices.mesh import batch_sharding, make_mesh
crops = np.load(sys.argv[1])
images = {}
for mesh, devices in (("data=1", 1), ("data=2,fsdp=4", 8)):
    mesh = make_mesh(mesh, jax.devices()[:devices])
    compiled = compile_augment(crops.shape, RECIPES["imagenet"], mesh)
    assert not communication(compiled.as_text()), communication(compiled.as_text())
    images[str(mesh)] = np.asarray(compiled(jax.device_put(crops, batch_sharding(mesh)), 7))
np.testing.assert_allclose(*images.values(), atol=1e-6)
"""


@pytest.mark.slow
def test_every_number_of_devices_gives_the_same_without_communication(crops, tmp_path):
    np.save(tmp_path / "crops.npy", crops[::3])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(devices=8)}
    command = [sys.executable, "-c", _ON_DEVICES, str(tmp_path / "crops.npy")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
