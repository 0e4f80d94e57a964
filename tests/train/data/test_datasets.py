"""The data set that a run asks for, and the digits, which are in memory or a prepared set."""

import dataclasses
import io
import pickle

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from convert.digits import held_out_indices
from train.data.datasets import open_digits, open_image_sets
from train.data.prepared.tfds import TfdsSource, open_tfds
from train.recipes import RECIPES


def test_the_digits_are_all_of_scikit_learns():
    sets = open_digits(None)
    assert sets.class_names == tuple("0123456789")
    digits = load_digits()
    held_out = held_out_indices(digits.target)
    expected = {"train": np.delete(np.arange(1797), held_out), "test": held_out}
    for source, indices in ((sets.train, expected["train"]), (sets.held_out, expected["test"])):
        samples = [source[i] for i in range(len(source))]
        pixels = [np.asarray(Image.open(io.BytesIO(sample["image"])))[..., 0] for sample in samples]
        # they are stored in the order of a hash, so compare as sets of (pixels, label)
        ours = {(p.tobytes(), sample["label"]) for p, sample in zip(pixels, samples, strict=True)}
        images = np.round(digits.images[indices] * 255 / 16).astype(np.uint8)
        assert ours == {(p.tobytes(), int(t)) for p, t in zip(images, digits.target[indices], strict=True)}
        assert len(samples) == len(indices)


def test_the_held_out_digits_are_a_fifth_of_each_class():
    labels = load_digits().target
    held_out = held_out_indices(labels)
    np.testing.assert_array_equal(held_out, held_out_indices(labels))
    counts, total = np.bincount(labels[held_out]), np.bincount(labels)
    assert np.all(np.abs(counts - total / 5) <= 0.5)


def test_digits_in_memory_are_what_tensorflow_datasets_stored(digits_dir):
    """A run that was begun with the prepared set goes on with the same batches."""
    here, stored = open_digits(None), open_tfds("sklearn_digits", digits_dir)
    assert isinstance(stored.train, TfdsSource)
    for ours, theirs in ((here.train, stored.train), (here.held_out, stored.held_out)):
        assert [ours[i] for i in range(len(ours))] == [theirs[i] for i in range(len(theirs))]
    about = ("class_names", "held_out_split", "fingerprint", "notes", "sorted_by_name")
    assert [getattr(here, name) for name in about] == [getattr(stored, name) for name in about]
    assert pickle.loads(pickle.dumps(here.train)) == here.train  # as it reaches the workers


def test_a_prepared_set_of_digits_is_read_where_there_is_one(digits_dir, tmp_path):
    assert isinstance(open_digits(digits_dir).train, TfdsSource)
    assert len(open_digits(str(tmp_path)).train) == 1438
    assert not list(tmp_path.iterdir())


def test_the_split_of_a_folder_follows_the_settings(image_folder):
    for i in range(8):
        image_folder(f"only/{i}.png")
    config = dataclasses.replace(RECIPES["imagenet"], dataset=f"folder:{image_folder()}", val_fraction=0.5)
    assert len(open_image_sets(config).held_out) == 4
