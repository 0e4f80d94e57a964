"""The data set that a run asks for, and the digits, which are prepared the first time."""

import dataclasses
import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

from convert.errors import SettingsError
from train.data.datasets import open_digits, open_image_sets
from train.data.held_out import held_out_indices
from train.recipes import RECIPES


def test_the_digits_are_all_of_scikit_learns(digits_dir):
    sets = open_digits(digits_dir)
    assert sets.class_names == tuple("0123456789")
    digits = load_digits()
    held_out = held_out_indices(digits.target)
    expected = {"train": np.delete(np.arange(1797), held_out), "test": held_out}
    for source, indices in ((sets.train, expected["train"]), (sets.held_out, expected["test"])):
        samples = [source[i] for i in range(len(source))]
        pixels = [np.asarray(Image.open(io.BytesIO(sample["image"])))[..., 0] for sample in samples]
        # tfds shuffles once when it writes, so compare as sets of (pixels, label)
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


def test_the_digits_are_prepared_once(digits_dir, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("prepared again")

    monkeypatch.setattr(tfds.core.GeneratorBasedBuilder, "download_and_prepare", refuse)
    open_digits(digits_dir)


def test_digits_that_cannot_be_written_are_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match=r"cannot prepare the digits.*--data-dir"):
        open_digits(str(tmp_path / "file" / "below"))


def test_the_split_of_a_folder_follows_the_settings(image_folder):
    for i in range(8):
        image_folder(f"only/{i}.png")
    config = dataclasses.replace(RECIPES["imagenet"], dataset=f"folder:{image_folder()}", val_fraction=0.5)
    assert len(open_image_sets(config).held_out) == 4
