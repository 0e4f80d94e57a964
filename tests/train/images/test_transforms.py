"""Training and evaluation images are timm's, and each depends on its own generator only."""

import dataclasses
import io
import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform, transforms
from torchvision.transforms import ColorJitter, functional

from crossvit_jax.preprocess import UnreadableImage, decode_image, normalised, preprocess_image
from train.images.transforms import CropTransform, EvalTransform, draw_crop, eval_transform, train_transform
from train.recipes import RECIPES

_IMAGENET = RECIPES["imagenet"]
_MODEL = _IMAGENET.model_config(1000)


def _augmented(sample, seed, config=_IMAGENET):
    transform = train_transform(config, config.model_config(1000))
    return transform(sample, np.random.default_rng(seed))


@pytest.fixture
def sample(photo):
    return {"image": photo, "label": 7, "name": "photo"}


def _encoded(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


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
        _assert_timms(reference, sample, seed, _IMAGENET)


@pytest.mark.parametrize(
    "only",
    [
        {},
        {"hflip": 0.5},
        {"erase_prob": 1.0},
        {"auto_augment": "augmix-m3"},
        {"vflip": 0.5},
        {"color_jitter": 0.4},
        {"hflip": 0.5, "vflip": 0.5, "color_jitter": 0.4, "auto_augment": "rand-m9-mstd0.5-inc1"},
    ],
)
def test_training_images_are_timms_with_few_of_its_steps_or_none(only):
    config = dataclasses.replace(RECIPES["digits"], crop_scale=(0.3, 1.0), **only)
    reference = create_transform(
        48,
        is_training=True,
        scale=config.crop_scale,
        ratio=config.crop_ratio,
        hflip=config.hflip,
        vflip=config.vflip,
        color_jitter=None,
        auto_augment=config.auto_augment or None,
        interpolation="bicubic",
        re_prob=config.erase_prob,
        re_mode="pixel",
    )
    if config.color_jitter:  # after RandAugment, as timm's force_color_jitter has it
        (end,) = (
            place for place, step in enumerate(reference.transforms) if isinstance(step, transforms.MaybeToTensor)
        )
        reference.transforms.insert(end, ColorJitter(*[config.color_jitter] * 3))
    digit = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for seed in range(20):
        _assert_timms(reference, {"image": _encoded(digit), "label": 7, "name": "digit"}, seed, config)


def _assert_timms(reference, sample, seed, config):
    seeds = [int(part) for part in np.random.default_rng(seed).integers(0, 2**32, size=3)]
    image = decode_image(sample["image"], "photo")  # before: beartype draws from Python's generator to check sequences
    random.seed(seeds[0])
    np.random.seed(seeds[1])
    torch.manual_seed(seeds[2])
    expected = reference(image).permute(1, 2, 0).numpy()
    augmented = _augmented(sample, seed, config)
    np.testing.assert_array_equal(augmented["image"], expected)
    assert augmented["label"] == 7


@pytest.mark.parametrize("image_size", [(240, 240), (48, 48), (48, 96), (120, 96)])
@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
def test_the_evaluation_image_is_timms(photo, image_size, crop_pct):
    reference = create_transform((3, *image_size), interpolation="bicubic", crop_pct=crop_pct)
    pixels = np.asarray(decode_image(photo, "photo"))  # 90 x 130
    for part in (pixels, pixels[:, :61], pixels[:, :90], pixels[:8, :7], pixels[:1, :3], pixels[:55, :110]):
        encoded = _encoded(np.ascontiguousarray(part))
        expected = reference(decode_image(encoded, "part")).permute(1, 2, 0).numpy()
        image = EvalTransform(image_size, crop_pct)({"image": encoded, "label": 7, "name": "part"})["image"]
        np.testing.assert_array_equal(normalised(image), expected)
        assert image.dtype == np.uint8
        assert image.flags.c_contiguous and image.base is None  # of what it was cut from nothing is kept


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


def test_a_part_of_an_image_has_at_least_one_pixel():
    """timm draws none of so few now and then, and makes black of them."""
    config = dataclasses.replace(_IMAGENET, auto_augment="", erase_prob=0.0)
    dot = _encoded(np.full((1, 1, 3), 255, np.uint8))
    for seed in range(20):
        assert (_augmented({"image": dot, "label": 0, "name": "dot"}, seed, config)["image"] > 2).all()


# --- posterising to nothing ---


@pytest.fixture
def pillow_13(monkeypatch):
    """Posterising as it is from Pillow 13 on."""
    posterize = ImageOps.posterize

    def strict(image, bits):
        if not 1 <= bits <= 8:
            raise ValueError("bits must be between or equal to 1 and 8")
        return posterize(image, bits)

    monkeypatch.setattr(ImageOps, "posterize", strict)


@pytest.mark.parametrize("auto_augment", ["rand-m10-p1-n1-inc1", "rand-m0-p1-n1"])
def test_posterising_to_0_bits_gives_black_with_any_pillow(sample, auto_augment, request, monkeypatch):
    """RandAugment at the highest magnitude, and the kind that grows weaker with it at the lowest."""
    config = dataclasses.replace(_IMAGENET, auto_augment=auto_augment, erase_prob=0.0)
    transform = train_transform(config, _MODEL)
    (randaugment,) = (step for step in transform.timm_transform.transforms if hasattr(step, "ops"))
    randaugment.ops = [op for op in randaugment.ops if op.name.startswith("Posterize")]
    assert len(randaugment.ops) == 1
    black = -np.array(IMAGENET_DEFAULT_MEAN) / np.array(IMAGENET_DEFAULT_STD)
    now = transform(sample, np.random.default_rng(0))["image"]
    np.testing.assert_allclose(now, np.broadcast_to(black, now.shape), atol=1e-6)
    request.getfixturevalue("pillow_13")
    np.testing.assert_array_equal(transform(sample, np.random.default_rng(0))["image"], now)


# --- order ---


def test_normalisation_comes_before_erasing(sample):
    """IBM's order. The noise is normal then: mean 0 and deviation 1, beyond what normalised pixels can reach."""
    config = dataclasses.replace(_IMAGENET, auto_augment="", erase_prob=1.0)
    erased = train_transform(config, _MODEL)
    intact = train_transform(dataclasses.replace(config, erase_prob=0.0), _MODEL)
    noise = []
    for seed in range(20):
        image, plain = (transform(sample, np.random.default_rng(seed))["image"] for transform in (erased, intact))
        box = (image != plain).any(axis=-1)
        assert box.any()
        noise.append(image[box])
    noise = np.concatenate(noise)
    assert scipy.stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
    assert np.abs(np.corrcoef(noise.T)[np.triu_indices(3, 1)]).max() < 0.01  # each channel has its own
    assert noise.min() < -3.5  # a black pixel is at -2.1


# --- workers that only crop: timm's draws, Pillow's pixels ---

_SCALE, _RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def _jpeg(image):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=92)
    return file.getvalue()


# of the last three no box of this shape fits, so that the largest one in the middle is taken
@pytest.mark.parametrize("size", [(427, 640), (50, 50), (10, 300), (300, 10), (1, 5)])
def test_boxes_are_drawn_as_by_timm(size, monkeypatch):
    image = Image.new("1", size[::-1])
    for seed in range(100):
        monkeypatch.setattr(transforms, "random", random.Random(seed))
        expected = transforms.RandomResizedCropAndInterpolation.get_params(image, _SCALE, _RATIO)
        assert draw_crop(random.Random(seed), size, _SCALE, _RATIO) == expected


def test_a_box_has_at_least_one_pixel():
    """timm draws none of an image of so few, and then cannot resize it."""
    for seed in range(50):
        *_, height, width = draw_crop(np.random.default_rng(seed), (2, 2), _SCALE, _RATIO)
        assert height > 0 < width


def test_a_crop_has_the_pixels_of_timms(photographs):
    transform = CropTransform((240, 224), _SCALE, _RATIO)
    for seed in range(8):
        encoded = _jpeg(photographs[seed % 2])
        sample = {"image": encoded, "label": 3, "name": "photograph"}
        ours = transform(sample, np.random.default_rng(seed))
        image = Image.open(io.BytesIO(encoded))
        box = draw_crop(np.random.default_rng(seed), image.size[::-1], _SCALE, _RATIO)
        bicubic = functional.InterpolationMode.BICUBIC
        np.testing.assert_array_equal(ours["image"], functional.resized_crop(image, *box, (240, 224), bicubic))
        assert (ours["image"].dtype, ours["label"], ours["label"].dtype) == (np.uint8, 3, np.int32)


@pytest.mark.parametrize("augment_on", ["host", "device"])
def test_images_are_turned_before_anything_else_is_done_to_them(photographs, augment_on):
    upright = photographs[0].resize((64, 43))
    exif = Image.Exif()
    exif[0x0112] = 6  # what is stored has to be turned by a quarter, clockwise
    file = io.BytesIO()
    upright.transpose(Image.Transpose.ROTATE_90).save(file, "PNG", exif=exif)
    lying = {"image": file.getvalue(), "label": 0, "name": ""}
    sample = {**lying, "image": _encoded(np.asarray(upright))}
    kept = dataclasses.replace(RECIPES["digits"], augment_on=augment_on)
    applied = dataclasses.replace(kept, exif="apply")
    model = kept.model_config(10)

    def made(config, sample):
        trained = train_transform(config, model)(sample, np.random.default_rng(0))["image"]
        return trained, eval_transform(model, config.exif)(sample)["image"]

    for turned, expected, stored in zip(made(applied, lying), made(kept, sample), made(kept, lying), strict=True):
        np.testing.assert_array_equal(turned, expected)
        assert not np.array_equal(stored, expected)
    assert isinstance(train_transform(applied, model), CropTransform) == (augment_on == "device")
    np.testing.assert_array_equal(
        preprocess_image(Image.open(io.BytesIO(lying["image"])), model, exif="apply"), normalised(made(kept, sample)[1])
    )


def test_an_unreadable_image_is_told_before_anything_is_drawn():
    rng = np.random.default_rng(0)
    with pytest.raises(UnreadableImage):
        CropTransform((8, 8), _SCALE, _RATIO)({"image": b"no image", "label": 0, "name": "some"}, rng)
    assert rng.random() == np.random.default_rng(0).random()


def test_a_worker_that_crops_needs_no_torch():
    """Importing it takes seconds, and half a gigabyte in every worker."""
    modules = "train.main, train.data.batches, train.images.transforms, train.images.resample"
    program = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
