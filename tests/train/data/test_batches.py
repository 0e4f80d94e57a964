"""The stream of batches: the same on any number of workers and hosts, whole epochs, damaged images in their places."""

import dataclasses
import os
import shutil
from collections import Counter
from contextlib import closing
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from crossvit_jax.preprocess import UnreadableImage, decode_image
from train.config import steps_per_epoch
from train.data.batches import eval_batches, train_batches
from train.data.datasets import open_digits
from train.data.folders.classes import open_folder
from train.data.sources import DataError
from train.data.tagged_images import TaggedImages
from train.images.transforms import eval_transform, train_transform
from train.inference.image_paths import FileSource
from train.recipes import RECIPES

# the digits' sizes, with every random step of the ImageNet recipe
_CONFIG = dataclasses.replace(
    RECIPES["imagenet"], image_size=48, image_scale=(1.0, 2 / 3), batch_size=16, workers=0, seed=5
)
_MODEL = _CONFIG.model_config(10)


class Numbers:
    """A source whose images do not matter: sample i has label i."""

    def __init__(self, count, unreadable=()):
        self.count, self.unreadable = count, unreadable

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.unreadable:
            raise UnreadableImage(f"number {index}", "it is damaged")
        return {"image": b"", "label": int(index), "name": ""}


def _noise(sample, rng):
    return {"image": rng.random(3, np.float32), "label": np.int32(sample["label"])}


def _noisy_pixel(sample, rng):
    pixel = decode_image(sample["image"], sample["name"]).getpixel((0, 0))
    return {"image": pixel + rng.random(3, np.float32), "label": np.int32(sample["label"])}


def _take(batches, count):
    with closing(iter(batches)) as stream:
        return [{name: np.array(value) for name, value in batch.items()} for batch in islice(stream, count)]


def _training(source, transform=_noise, *, batches, batch_size=16, seed=5, workers=0, **place):
    return _take(train_batches(source, transform, batch_size=batch_size, seed=seed, workers=workers, **place), batches)


def _assert_equal(ours, others):
    for mine, other in zip(ours, others, strict=True):
        assert set(mine) == set(other)
        for name in mine:
            np.testing.assert_array_equal(mine[name], other[name])


def _joined(processes):
    """The batches of each process, as those of one process."""
    return [{name: np.concatenate([b[name] for b in parts]) for name in parts[0]} for parts in zip(*processes)]  # noqa: B905


@pytest.fixture
def pictures(image_folder):
    """A folder of 40 images of one class, all for training but one, and its source."""
    for i in range(41):
        image_folder(f"only/{i:02}.png", seed=i, size=(4, 5))
    return open_folder(image_folder(), val_fraction=0.001, seed=0).train


# --- the same stream everywhere ---


@pytest.mark.parametrize("workers", [2, 3])
def test_the_stream_is_the_same_with_any_number_of_workers(pictures, workers):
    expected = _training(pictures, _noisy_pixel, batch_size=8, repeats=3, batches=13)
    _assert_equal(expected, _training(pictures, _noisy_pixel, batch_size=8, repeats=3, batches=13, workers=workers))


def test_augmented_images_are_the_same_in_a_worker(pictures):
    transform = train_transform(_CONFIG, _MODEL)

    def and_threads(sample, rng):
        import torch

        return {**transform(sample, rng), "threads": np.int32(torch.get_num_threads())}

    batches = _training(pictures, transform, batches=3)
    in_worker = _training(pictures, and_threads, batches=3, workers=1)
    assert [set(batch.pop("threads").tolist()) for batch in in_worker] == [{1}] * 3  # the cores are for others
    _assert_equal(batches, in_worker)
    assert (batches[0]["image"].shape, batches[0]["image"].dtype) == ((16, 48, 48, 3), np.float32)
    assert (batches[0]["label"].shape, batches[0]["label"].dtype) == ((16,), np.int32)
    assert (batches[0]["bad"].tolist(), batches[0]["bad"].dtype) == ([-1] * 16, np.int32)


@pytest.mark.parametrize("repeats", [1, 3])
def test_a_later_start_continues_the_stream(repeats):
    stream = _training(Numbers(50), batches=12, repeats=repeats)
    for start in (1, 3, 7):  # within the first epoch of 3 batches, at its end, beyond it
        _assert_equal(stream[start:], _training(Numbers(50), batches=12 - start, repeats=repeats, start_step=start))


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("processes", [2, 4])
def test_the_parts_of_the_processes_in_a_row_are_the_batch_of_one(processes, repeats):
    source = Numbers(50, unreadable=(7,))
    alone = _training(source, batches=8, repeats=repeats, start_step=2)
    each = [
        _training(source, batches=8, repeats=repeats, start_step=2, process_index=index, process_count=processes)
        for index in range(processes)
    ]
    assert all(len(batch["label"]) == 16 // processes for batches in each for batch in batches)
    _assert_equal(alone, _joined(each))


# --- epochs ---


def test_an_epoch_holds_each_image_at_most_once_and_leaves_a_new_rest_out():
    steps = steps_per_epoch(50, 16)
    assert steps == 3
    labels = [batch["label"] for batch in _training(Numbers(50), batches=4 * steps)]
    epochs = [np.concatenate(labels[i : i + steps]) for i in range(0, len(labels), steps)]
    left_out = {tuple(sorted(set(range(50)) - set(epoch.tolist()))) for epoch in epochs}
    assert all(len(set(epoch.tolist())) == 48 for epoch in epochs)
    assert len(left_out) > 1
    assert not np.array_equal(epochs[0], epochs[1])


def test_the_seed_decides_order_and_augmentation():
    first, again, other = (_training(Numbers(50), batches=3, seed=seed) for seed in (1, 1, 2))
    _assert_equal(first, again)
    for name in ("label", "image"):
        assert not np.array_equal(first[0][name], other[0][name])


@pytest.mark.parametrize("repeats", [1, 3])
def test_every_draw_is_one_of_its_own(repeats):
    """In each epoch anew, and for each copy of an image in one epoch."""
    images = np.concatenate([batch["image"] for batch in _training(Numbers(48), batches=6, repeats=repeats)])
    assert len(np.unique(images, axis=0)) == 6 * 16


@pytest.mark.parametrize("images", [96, 256, 700])
@pytest.mark.parametrize(("ranks", "repeats"), [(1, 3), (4, 3), (4, 2)])
def test_repeated_augmentation_takes_the_places_of_timms_sampler(images, ranks, repeats):
    """timm's ranks together get in each step what our step has; below 256 images too, where DeiT's own gives none."""
    from timm.data.distributed_sampler import RepeatAugSampler  # here: workers, which import this file, start sooner

    batch_size = 32
    samplers = [
        RepeatAugSampler(range(images), num_replicas=ranks, rank=rank, shuffle=False, num_repeats=repeats)
        for rank in range(ranks)
    ]
    steps = len(samplers[0]) // (batch_size // ranks)
    assert steps_per_epoch(images, batch_size, repeats) == steps > 0
    labels = [batch["label"] for batch in _training(Numbers(images), batches=2 * steps, batch_size=32, repeats=repeats)]
    orders = []
    for epoch in (labels[:steps], labels[steps:]):
        order = list(dict.fromkeys(np.concatenate(epoch).tolist()))
        orders.append(order)
        for step, batch in enumerate(epoch):
            part = slice(step * batch_size // ranks, (step + 1) * batch_size // ranks)
            places = [place for sampler in samplers for place in list(sampler)[part]]
            assert Counter(batch.tolist()) == Counter(order[place] for place in places)
        # copies follow one another, so that mixing and the processes of a host see them as DeiT's do
        assert np.concatenate(epoch)[: repeats * 3].tolist() == np.repeat(order[:3], repeats).tolist()
    assert orders[0] != orders[1]


# --- evaluation ---


@pytest.mark.parametrize("batch_size", [64, 359, 512])
def test_every_held_out_image_is_seen_once_whatever_the_batch(digits_dir, batch_size):
    source = open_digits(digits_dir).held_out
    rounds = -(-len(source) // batch_size)
    stream = eval_batches(source, eval_transform(_MODEL), batch_size=batch_size, workers=0)
    batches = _take(stream, 2 * rounds)
    assert all((x["image"].shape, x["image"].dtype) == ((batch_size, 48, 48, 3), np.uint8) for x in batches)
    for once in (batches[:rounds], batches[rounds:]):
        labels = np.concatenate([batch["label"][batch["mask"] == 1] for batch in once])
        np.testing.assert_array_equal(labels, [source[i]["label"] for i in range(len(source))])
        assert sum(batch["mask"].sum() for batch in once) == len(source)
    assert all((batch["bad"] == -1).all() for batch in batches)
    filling = batches[rounds - 1]["image"][batches[rounds - 1]["mask"] == 0]
    assert not filling.any()


@pytest.mark.parametrize("images", [3, 20, 39])
def test_all_processes_evaluate_in_as_many_batches_as_one(pictures, images):
    """Where there are few images, a process may have nothing but filling."""
    source = dataclasses.replace(pictures, files=pictures.files[:images])

    def batches(**place):
        return _take(eval_batches(source, eval_transform(_MODEL), batch_size=8, workers=0, **place), rounds + 1)

    rounds = -(-images // 8)
    alone = batches()
    _assert_equal(alone, _joined([batches(process_index=index, process_count=4) for index in range(4)]))
    assert sum(batch["mask"].sum() for batch in alone[:rounds]) == images


# --- images that cannot be read ---


def _damage(source):
    """Four kinds of damage, two in a row and one at the end; the indices of the files."""
    paths = [f"{source.root}/{file}" for file in source.files]
    with open(paths[3], "rb") as file:
        half = file.read()[:60]
    for index, content in ((3, half), (20, b""), (21, b"<html>404</html>"), (39, None)):
        if content is None:
            os.remove(paths[index])
        else:
            with open(paths[index], "wb") as file:
                file.write(content)
    return {3: 4, 20: 22, 21: 22, 39: 0}


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_told_and_the_next_one_takes_its_place(pictures, workers):
    def labelled():
        labels = np.arange(40)
        return dataclasses.replace(pictures, labels=labels)

    assert len(pictures) == 40
    intact = _training(labelled(), _noisy_pixel, batches=10, batch_size=8)
    instead = _damage(pictures)
    damaged = _training(labelled(), _noisy_pixel, batches=10, batch_size=8, workers=workers)
    told = Counter()
    for before, after in zip(intact, damaged, strict=True):
        bad = np.isin(before["label"], list(instead))
        np.testing.assert_array_equal(after["bad"], np.where(bad, before["label"], -1))
        np.testing.assert_array_equal(after["label"], [instead.get(i, i) for i in before["label"].tolist()])
        np.testing.assert_array_equal(after["image"][~bad], before["image"][~bad])
        for label, image, old in zip(after["label"][bad], after["image"][bad], before["image"][bad], strict=True):
            sample = labelled()[label]
            pixel = decode_image(sample["image"], "").getpixel((0, 0))
            # the draws are still those of the place
            np.testing.assert_allclose(image - pixel, old - np.floor(old), atol=1e-4)
        told.update(after["bad"][bad].tolist())
    assert told == dict.fromkeys(instead, 2)  # once in each of two epochs


def test_images_with_an_orientation_are_marked(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    for i in range(6):
        tagged = {"exif": exif} if i % 3 == 1 else {}
        Image.new("RGB", (9, 9), (i, 0, 0)).save(tmp_path / f"{i}.png", **tagged)
    (tmp_path / "2.png").write_bytes(b"no image")
    source = FileSource(tuple(str(tmp_path / f"{i}.png") for i in range(6)))
    (batch,) = _take(eval_batches(source, eval_transform(_MODEL), batch_size=8, workers=0), 1)
    assert batch["tagged"].tolist() == [0, 1, -1, 0, 1, 0, -1, -1]
    counted = TaggedImages()
    counted.add(batch["tagged"])
    assert counted.told("keep", "held-out").startswith("2 of 5 held-out images carry an EXIF orientation and were t")
    (batch,) = _training(source, _noisy_pixel, batches=1, batch_size=6)
    reds = np.floor(batch["image"][:, 0])
    assert batch["tagged"].tolist() == [int(red in (1, 4)) for red in reds]


def test_an_unreadable_image_is_left_out_of_evaluation(pictures):
    instead = _damage(pictures)
    batches = _take(eval_batches(pictures, eval_transform(_MODEL), batch_size=16, workers=0), 3)
    bad, mask, images = (np.concatenate([batch[name] for batch in batches]) for name in ("bad", "mask", "image"))
    np.testing.assert_array_equal(bad, [i if i in instead else -1 for i in range(48)])
    np.testing.assert_array_equal(mask, [i < 40 and i not in instead for i in range(48)])
    assert not images[mask == 0].any()
    assert images[mask == 1].any(axis=(1, 2, 3)).all()


def test_a_long_run_of_unreadable_images_is_an_error_and_a_shorter_one_is_not():
    (batch,) = _training(Numbers(1000, unreadable=range(100, 163)), batches=1, batch_size=1000)
    assert Counter(batch["label"].tolist())[163] == 64
    with pytest.raises(DataError, match=r"64 images in a row .* cannot read image number 1\d\d: it is damaged"):
        _training(Numbers(1000, unreadable=range(100, 164)), batches=1, batch_size=1000)
    with pytest.raises(DataError, match="3 images in a row"):
        _training(Numbers(3, unreadable=range(3)), batches=1, batch_size=3)


@pytest.mark.parametrize("left", ["nothing", "an empty folder"])
def test_a_data_set_that_vanishes_is_an_error_that_names_it(pictures, left):
    shutil.rmtree(pictures.root)
    if left == "an empty folder":
        os.mkdir(pictures.root)
    for workers in (0, 1) if left == "nothing" else (0,):
        with pytest.raises(DataError, match=f"the data set is gone: {pictures.root} is missing"):
            _training(pictures, _noisy_pixel, batches=1, workers=workers)
    with pytest.raises(DataError, match=f"the data set is gone: {pictures.root} is missing"):
        _take(eval_batches(pictures, eval_transform(_MODEL), batch_size=4, workers=0), 1)
