"""Training and evaluation images are timm's, and each depends on its own generator only."""

import io
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from train.config import RECIPES
from train.transforms import UnreadableImage, decode_image, eval_transform, train_transform

_IMAGENET = RECIPES["imagenet"]
_MODEL = _IMAGENET.model_config(1000)


def _augmented(sample, seed, config=_IMAGENET):
    transform = train_transform(config, config.model_config(1000))
    return transform(sample, np.random.default_rng(seed))


@pytest.fixture
def sample(photo):
    return {"image": photo, "label": 7, "name": "photo"}


def test_training_images_are_those_of_the_recipe_in_timm(sample):
    reference = create_transform(
        240,
        is_training=True,
        color_jitter=None,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
    )
    for seed in range(12):  # enough for every step of the recipe to happen
        seeds = [int(part) for part in np.random.default_rng(seed).integers(0, 2**32, size=3)]
        random.seed(seeds[0])
        np.random.seed(seeds[1])
        torch.manual_seed(seeds[2])
        expected = reference(decode_image(sample["image"], "photo")).permute(1, 2, 0).numpy()
        augmented = _augmented(sample, seed)
        np.testing.assert_array_equal(augmented["image"], expected)
        assert augmented["label"] == 7


def test_the_evaluation_image_is_timms(sample):
    reference = create_transform(240, interpolation="bicubic", crop_pct=0.875)
    expected = reference(decode_image(sample["image"], "photo")).permute(1, 2, 0).numpy()
    image = eval_transform(_MODEL)(sample)["image"]
    np.testing.assert_array_equal(image, expected)
    assert image.dtype == np.float32
    assert image.flags.c_contiguous


def test_an_image_depends_on_its_generator_only(sample):
    first, again, other = (_augmented(sample, seed)["image"] for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_threads_do_not_disturb_each_other(sample):
    transform = train_transform(_IMAGENET, _MODEL)
    alone = [transform(sample, np.random.default_rng(seed))["image"] for seed in range(16)]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda seed: transform(sample, np.random.default_rng(seed))["image"], range(16)))
    np.testing.assert_array_equal(alone, together)


def test_others_that_draw_at_the_same_time_do_not_disturb(sample):
    transform = train_transform(_IMAGENET, _MODEL)
    alone = [transform(sample, np.random.default_rng(seed))["image"] for seed in range(16)]
    stop = threading.Event()

    def draw():
        while not stop.is_set():
            random.random()

    with ThreadPoolExecutor(1) as thread:
        thread.submit(draw)
        try:
            disturbed = [transform(sample, np.random.default_rng(seed))["image"] for seed in range(16)]
        finally:
            stop.set()
    np.testing.assert_array_equal(alone, disturbed)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_images_of_any_mode_become_rgb(mode):
    file = io.BytesIO()
    Image.new("RGB", (9, 5), (40, 90, 200)).convert(mode).save(file, format="TIFF")
    image = decode_image(file.getvalue(), "some")
    assert (image.mode, image.size) == ("RGB", (9, 5))


@pytest.mark.parametrize("damage", ["empty", "no image", "truncated"])
def test_an_unreadable_image_is_named(photo, damage):
    encoded = {"empty": b"", "no image": b"hello", "truncated": photo[: len(photo) // 2]}[damage]
    with pytest.raises(UnreadableImage, match="cannot read image cat"):
        decode_image(encoded, "cat/1.png")
