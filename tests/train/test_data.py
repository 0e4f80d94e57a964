"""The stream of batches: the same with any number of workers, whole epochs, and every held-out image once."""

import dataclasses
from contextlib import closing
from itertools import islice

import numpy as np
import pytest

from train.config import RECIPES
from train.data import eval_batches, steps_per_epoch, train_batches
from train.sources import open_digits, open_folder
from train.transforms import eval_transform, train_transform

# the digits' sizes, with every random step of the ImageNet recipe
_CONFIG = dataclasses.replace(
    RECIPES["imagenet"], image_size=48, image_scale=(1.0, 2 / 3), batch_size=16, workers=0, seed=5
)
_MODEL = _CONFIG.model_config(10)


class Numbers:
    """A source whose images do not matter: sample i has label i."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"image": b"", "label": int(index), "name": ""}


def _labels_only(sample, rng):
    return {"label": np.int32(sample["label"])}


def _take(batches, count):
    with closing(iter(batches)) as stream:
        return [{name: np.array(value) for name, value in batch.items()} for batch in islice(stream, count)]


def _training(source, *, workers=0, start_step=0, count=4):
    batches = train_batches(
        source,
        train_transform(_CONFIG, _MODEL),
        batch_size=_CONFIG.batch_size,
        seed=_CONFIG.seed,
        workers=workers,
        start_step=start_step,
    )
    return _take(batches, count)


def _assert_equal(ours, others):
    for mine, other in zip(ours, others, strict=True):
        for name in mine:
            np.testing.assert_array_equal(mine[name], other[name])


def _labels(count, *, batch_size, seed, batches):
    stream = train_batches(Numbers(count), _labels_only, batch_size=batch_size, seed=seed, workers=0)
    return [batch["label"] for batch in _take(stream, batches)]


def test_the_stream_is_the_same_with_any_number_of_workers(digits_dir):
    source = open_digits(digits_dir).train
    alone = _training(source)
    for workers in (1, 2):
        _assert_equal(alone, _training(source, workers=workers))


def test_a_folders_stream_is_the_same_in_workers_and_from_a_later_step(image_folder):
    for i in range(40):
        image_folder(f"{'ab'[i % 2]}/{i}.png", seed=i)
    source = open_folder(image_folder(), val_fraction=0.1, seed=0).train
    alone = _training(source)
    _assert_equal(alone[2:], _training(source, start_step=2, count=2))
    _assert_equal(alone[1:], _training(source, start_step=1, count=3, workers=1))


def test_batches_are_what_the_model_takes(digits_dir):
    batch = _training(open_digits(digits_dir).train, count=1)[0]
    assert (batch["image"].shape, batch["image"].dtype) == ((16, 48, 48, 3), np.float32)
    assert (batch["label"].shape, batch["label"].dtype) == ((16,), np.int32)


def test_an_epoch_holds_each_image_at_most_once_and_leaves_a_new_rest_out():
    steps = steps_per_epoch(50, 16)
    assert steps == 3
    batches = _labels(50, batch_size=16, seed=0, batches=4 * steps)
    epochs = [np.concatenate(batches[i : i + steps]) for i in range(0, len(batches), steps)]
    left_out = {tuple(sorted(set(range(50)) - set(epoch.tolist()))) for epoch in epochs}
    assert all(len(set(epoch.tolist())) == 48 for epoch in epochs)
    assert len(left_out) > 1
    assert not np.array_equal(epochs[0], epochs[1])


def test_the_seed_decides_the_order():
    first, again, other = (_labels(50, batch_size=16, seed=seed, batches=3) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_an_image_looks_different_in_each_epoch(image_folder):
    for i in range(17):
        image_folder(f"only/{i}.png", seed=i)
    source = open_folder(image_folder(), val_fraction=0.01, seed=0).train
    epochs = [batch["image"] for batch in _training(source, count=3)]
    flat = {image.tobytes() for epoch in epochs for image in epoch}
    assert len(flat) == 48


@pytest.mark.parametrize("batch_size", [64, 100, 359, 512])
def test_every_held_out_image_is_seen_once_whatever_the_batch(digits_dir, batch_size):
    source = open_digits(digits_dir).held_out
    rounds = -(-len(source) // batch_size)
    stream = eval_batches(source, eval_transform(_MODEL), batch_size=batch_size, workers=0)
    batches = _take(stream, 2 * rounds)
    assert all(batch["image"].shape == (batch_size, 48, 48, 3) for batch in batches)
    for once in (batches[:rounds], batches[rounds:]):
        labels = np.concatenate([batch["label"][batch["mask"] == 1] for batch in once])
        np.testing.assert_array_equal(labels, [source[i]["label"] for i in range(len(source))])
    filling = batches[rounds - 1]["image"][batches[rounds - 1]["mask"] == 0]
    assert not filling.any()
