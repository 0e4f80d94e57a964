"""The 1,797 handwritten digits inside scikit-learn as a tensorflow-datasets builder: real images with no download.

They are 8×8 grey pixels with 17 levels, from the test set of the UCI collection "Optical Recognition of Handwritten
Digits". A fifth of each class is held out, by a fixed seed.
"""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from train.data.held_out import held_out_indices


class SklearnDigits(tfds.core.GeneratorBasedBuilder):
    """`sklearn_digits`: splits `train` (1,438 images) and `test` (359)."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Stratified, fixed test split of one fifth."}  # noqa: RUF012 (tfds reads it as it is)
    # tfds looks for a package folder with metadata files around a builder's module; there is none
    pkg_dir_path = None

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(8, 8, 3), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
        }
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
        )

    def _split_generators(self, dl_manager):
        from sklearn.datasets import load_digits

        digits = load_digits()
        held_out = held_out_indices(digits.target)
        return {
            "train": self._generate_examples(digits, np.setdiff1d(np.arange(len(digits.target)), held_out)),
            "test": self._generate_examples(digits, held_out),
        }

    def _generate_examples(self, digits, indices):
        """Pairs (key, example). Images are given as encoded bytes: to encode an array, tfds would import TensorFlow."""
        for index in indices:
            pixels = np.round(digits.images[index] * (255 / 16)).astype(np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).convert("RGB").save(file, format="PNG")
            file.seek(0)
            yield int(index), {"image": file, "label": int(digits.target[index])}
