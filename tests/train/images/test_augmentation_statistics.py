"""What our training images draw has the distribution of what timm draws: it is seeded otherwise, not distorted.

The steps of timm's transform are watched while they run, once from our pipeline's generators, image by image, and once
from timm's own global ones, seeded a single time. Where the device augments, its draws are looked at, and those of the
workers' crops. That the same draws give the same pixels is tested elsewhere.
"""

import dataclasses
import io
import math
import random
import threading
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from itertools import pairwise

import grain
import jax
import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image
from timm.data import auto_augment, create_transform

from train.data.batches import train_batches
from train.images.augment import FINENESS, OPERATIONS, draw_batch
from train.images.transforms import TrainTransform, draw_crop
from train.recipes import RECIPES

_IMAGES = 4000
_SIZE = 64
_LARGE = Image.new("1", (4000, 4000))  # crops are drawn for this one, so that rounding to pixels does not show
_SURE = 1e-3  # of 50 figures that are right, one has a probability below it once in 20 seeds

_IMAGENET = RECIPES["imagenet"]
_TWO_SIDED = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
_AROUND_ONE = ("ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing")


@dataclass
class Draws:
    """What was drawn for one image."""

    crop: tuple[int, int, int, int]  # top, left, height, width
    flipped: bool = False
    drawn: list[str] = field(default_factory=list)  # the operations that RandAugment chose
    applied: list[str] = field(default_factory=list)  # and those that it went on to apply
    magnitudes: list[float] = field(default_factory=list)
    arguments: dict[str, list] = field(default_factory=dict)  # by the name of the operation
    erased: tuple[int, int, int, int] | None = None  # top, left, height, width


def _watch(compose):
    """A list that grows by the draws of each image that goes through a transform of timm.

    RandAugment's operations then leave images as they are: only what they draw counts.
    """
    images = []
    crop, flip, randaugment, *_, erasing = compose.transforms
    get_params = crop.get_params

    def get_whole(image, scale, ratio):
        _begin(images, get_params(_LARGE, scale, ratio))
        return 0, 0, image.height, image.width

    def maybe_flip(image):
        flipped = flip(image)
        _now.image.flipped = flipped is not image
        return flipped

    def operation(op):
        level_fn = op.level_fn

        def level_to_arguments(magnitude, hparams):
            _now.image.magnitudes.append(magnitude)
            return level_fn(magnitude, hparams)

        def apply(image, *arguments, **_):
            _now.image.applied.append(op.name)
            _now.image.arguments.setdefault(op.name, []).extend(arguments)
            return image

        def call(image):
            _now.image.drawn.append(op.name)
            return op(image)

        op.level_fn, op.aug_fn = level_fn and level_to_arguments, apply
        return call

    def maybe_erase(image):
        before = image.numpy().copy()
        changed = (erasing(image).numpy() != before).any(axis=0)
        if changed.any():
            rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
            _now.image.erased = (rows[0], columns[0], len(rows), len(columns))
        return image

    crop.get_params = get_whole
    randaugment.ops = [operation(op) for op in randaugment.ops]
    compose.transforms[1], compose.transforms[-1] = maybe_flip, maybe_erase
    return images


_now = threading.local()  # the image that is being made: those of two threads must not be taken for one


def _begin(images, crop):
    _now.image = Draws(crop=crop)
    images.append(_now.image)


class Same:
    """A source of one picture again and again."""

    def __init__(self):
        file = io.BytesIO()
        pixels = np.random.default_rng(0).integers(0, 256, (_SIZE, _SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "PPM")
        self.sample = {"image": file.getvalue(), "label": 0, "name": "the picture"}

    def __len__(self):
        return _IMAGES

    def __getitem__(self, index):
        return self.sample


def _on_host(config):
    """The draws of our pipeline where the workers augment."""
    transform = TrainTransform(config, (_SIZE, _SIZE))
    images = _watch(transform.timm_transform)
    others = set(threading.enumerate())

    def draw_whole(rng, size, scale, ratio):  # timm's crop is not asked
        _begin(images, draw_crop(rng, _LARGE.size, scale, ratio))
        return 0, 0, *size

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.images.transforms.draw_crop", draw_whole)
        # one thread, so that they come in their order
        patch.setattr("train.data.batches._READ_OPTIONS", grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
        batches = train_batches(Same(), transform, batch_size=100, seed=0, workers=0)
        with closing(iter(batches)) as stream:
            for _ in range(_IMAGES // 100 + 1):  # more than is looked at: the reader ends after the patches
                next(stream)
    for reader in set(threading.enumerate()) - others:  # which ends what it has begun, and would set timm's generators
        reader.join()
    return images[:_IMAGES]


def _on_device(config):
    """The draws of our pipeline where the device augments."""
    batch = draw_batch(config, 3, np.arange(_IMAGES), (_SIZE, _SIZE))
    batch = jax.device_get(batch._replace(noise=batch.flip))  # keys are no numpy arrays
    images = []
    for number in range(_IMAGES):
        drawn = jax.tree.map(lambda values, number=number: values[number], batch)
        rng = np.random.default_rng((config.seed, number))
        crop = draw_crop(rng, (_LARGE.height, _LARGE.width), config.crop_scale, config.crop_ratio)
        image = Draws(crop=crop, flipped=bool(drawn.flip))
        for place, applied, level, negative in zip(*drawn[1:5], strict=True):
            name = OPERATIONS[place]
            name += "Increasing" * (f"{name}Increasing" in auto_augment.NAME_TO_OP)
            image.drawn.append(name)
            if applied:
                image.applied.append(name)
                _note_arguments(image, name, level / FINENESS, negative)
        top, bottom, left, right = drawn.box
        if bottom:
            image.erased = (top, left, bottom - top, right - left)
        images.append(image)
    return images


def _note_arguments(image, name, magnitude, negative):
    to_arguments = auto_augment.LEVEL_TO_ARG[name]
    arguments = ()
    if to_arguments is not None:
        image.magnitudes.append(magnitude)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(auto_augment, "_randomly_negate", lambda value: -value if negative else value)
            arguments = to_arguments(magnitude, {})
    image.arguments.setdefault(name, []).extend(arguments)


@pytest.fixture(scope="module", params=[_on_host, _on_device])
def our_draws(request):
    """Gives our draws with some settings."""
    return request.param


@pytest.fixture(scope="module")
def ours(our_draws):
    return our_draws(_IMAGENET)


@pytest.fixture(scope="module")
def timms():
    transform = create_transform(
        _SIZE,
        is_training=True,
        color_jitter=None,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
    )
    images = _watch(transform)
    picture = Image.open(io.BytesIO(Same().sample["image"]))
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    for _ in range(_IMAGES):
        transform(picture)
    return images


def _box_figures(boxes, side, name):
    top, left, height, width = np.array(boxes).T
    return {
        f"{name} area": height * width / side**2,
        f"{name} aspect": np.log(width / height),
        f"{name} top": _share(top, side - height),
        f"{name} left": _share(left, side - width),
    }


def _figures(images):
    """What is drawn from a range: name → values."""
    arguments = {}
    for image in images:
        for name, values in image.arguments.items():
            arguments.setdefault(f"argument of {name}", []).extend(values)
    return {
        **_box_figures([image.crop for image in images], _LARGE.width, "crop"),
        **_box_figures([image.erased for image in images if image.erased], _SIZE, "erased"),
        "magnitude": [magnitude for image in images for magnitude in image.magnitudes],
        **{name: values for name, values in arguments.items() if values},
    }


def _share(drawn, largest):
    """Whole numbers from 0 to the largest as numbers from 0 to 1: uniform, if the whole ones were."""
    return (drawn + np.random.default_rng(0).random(len(drawn))) / (largest + 1)


def _counts(images):
    """What is drawn from a few kinds: name → kind → how many."""

    def signs(image):
        for name, arguments in image.arguments.items():
            if name in _TWO_SIDED or name in _AROUND_ONE:
                yield from (f"{name} {'up' if argument > (name in _AROUND_ONE) else 'down'}" for argument in arguments)

    def large(image):
        return image.crop[2] * image.crop[3] > _LARGE.width**2 / 2

    pairs = list(pairwise(images))
    values = {
        "operations": [name for image in images for name in image.drawn],
        "pairs of operations": [" ".join(image.drawn) for image in images],
        "operations applied": [name for image in images for name in image.applied],
        "how many applied": [str(len(image.applied)) for image in images],
        "signs": [sign for image in images for sign in signs(image)],
        "magnitude at the limit": [str(m == 10) for image in images for m in image.magnitudes],
        "flipped": [str(image.flipped) for image in images],
        "erased": [str(image.erased is not None) for image in images],
        # one step does not know of another, nor one image of the next
        "flipped and erased": [f"{image.flipped} {image.erased is not None}" for image in images],
        "flipped and applied": [f"{image.flipped} {len(image.applied)}" for image in images],
        "crop and flipped": [f"{large(image)} {image.flipped}" for image in images],
        "crop and applied": [f"{large(image)} {len(image.applied)}" for image in images],
        "crop and erased": [f"{large(image)} {image.erased is not None}" for image in images],
        "applied and erased": [f"{len(image.applied)} {image.erased is not None}" for image in images],
        "flipped, two in a row": [f"{one.flipped} {other.flipped}" for one, other in pairs[::2]],
        "operations, two in a row": [f"{one.drawn[1]} {other.drawn[0]}" for one, other in pairs],
    }
    return {name: Counter(kinds) for name, kinds in values.items()}


def _probabilities(ours, timms):
    """By figure, how probable a difference of this size is where there is none."""
    found = {}
    theirs = _counts(timms)
    for name, counts in _counts(ours).items():
        kinds = sorted(set(counts) | set(theirs[name]))
        found[name] = scipy.stats.chi2_contingency([[side[kind] for kind in kinds] for side in (counts, theirs[name])])[
            1
        ]
    theirs = _figures(timms)
    for name, values in _figures(ours).items():
        found[name] = scipy.stats.ks_2samp(values, theirs[name]).pvalue
    return found


def test_every_figure_is_distributed_as_in_timm(ours, timms):
    found = _probabilities(ours, timms)
    assert len(found) == 16 + 4 + 4 + 1 + 12  # 12 of the 15 operations take an argument
    assert {name: p for name, p in found.items() if not p > _SURE} == {}


def test_every_figure_is_distributed_as_the_recipe_says(ours):
    """Against numbers worked out by hand, so that both sides cannot be wrong together."""
    counts, figures = _counts(ours), _figures(ours)
    # Of a square image: area uniform in .08–1, log aspect uniform, drawn again where they do not fit. So the smaller
    # areas have every aspect, and an area has only those up to its inverse.
    width = math.log(4 / 3)
    areas, aspects = np.linspace(0.08, 1, 10001), np.linspace(-width, width, 10001)
    densities = {
        "crop area": (areas, np.minimum(-np.log(areas), width)),
        "crop aspect": (aspects, np.exp(-np.abs(aspects)) - 0.08),
    }
    below_limit = [magnitude for magnitude in figures["magnitude"] if magnitude < 10]

    def share(name, probability):
        return scipy.stats.binomtest(counts[name]["True"], counts[name].total(), probability).pvalue

    def alike(name, kinds):
        assert len(counts[name]) == kinds
        return scipy.stats.chisquare(list(counts[name].values())).pvalue

    found = {
        "15 operations alike": alike("operations", 15),
        "their pairs alike, with replacement": alike("pairs of operations", 15 * 15),
        "each applied alike": alike("operations applied", 15),
        "two of them, each applied or not": scipy.stats.chisquare(
            [counts["how many applied"][kind] for kind in "012"], _IMAGES * np.array([0.25, 0.5, 0.25])
        ).pvalue,
        "either sign, of 9 operations": alike("signs", 2 * 9),
        "flipped": share("flipped", 0.5),
        "flipped, two in a row": alike("flipped, two in a row", 4),
        "erased": share("erased", 0.25),
        "magnitude at the limit": share("magnitude at the limit", scipy.stats.norm.sf(10, 9, 0.5)),
        "magnitude": scipy.stats.kstest(
            below_limit, lambda x: scipy.stats.norm.cdf(x, 9, 0.5) / scipy.stats.norm.cdf(10, 9, 0.5)
        ).pvalue,
        **{
            name: scipy.stats.kstest(figures[name], "uniform").pvalue
            for name in ("crop top", "crop left", "erased top", "erased left")
        },
        **{
            name: scipy.stats.kstest(
                figures[name], lambda x, g=grid, d=density: np.interp(x, g, np.cumsum(d) / d.sum())
            ).pvalue
            for name, (grid, density) in densities.items()
        },
    }
    assert {name: p for name, p in found.items() if not p > _SURE} == {}
    assert 0.018 < figures["erased area"].min() < 0.025 < 0.3 < figures["erased area"].max() < 0.35
    assert 0.28 < np.exp(figures["erased aspect"]).min() < 0.4 < 2.5 < np.exp(figures["erased aspect"]).max() < 3.6


def test_a_slightly_different_recipe_is_noticed(our_draws, timms):
    wrong = dataclasses.replace(
        _IMAGENET,
        auto_augment="rand-m8-mstd0.6-p0.45-inc1",
        erase_prob=0.35,
        hflip=0.4,
        crop_scale=(0.12, 1.0),
        crop_ratio=(0.7, 1 / 0.7),
    )
    found = _probabilities(our_draws(wrong), timms)
    changed = {"how many applied", "flipped", "erased", "magnitude", "magnitude at the limit"}
    changed |= {"crop area", "crop aspect", *(name for name in found if name.startswith("argument of"))}
    assert {name for name in changed if not found[name] < _SURE} == set()
    same = {"operations", "pairs of operations", "crop top", "erased top", "erased area"}
    assert {name for name in same if not found[name] > _SURE} == set()
