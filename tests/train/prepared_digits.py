"""The digits as a tensorflow-datasets set: what earlier versions wrote, and a prepared set to test with."""

import contextlib
import io
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from convert.digits import held_out_indices
from convert.errors import quiet


class SklearnDigits(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """`sklearn_digits`: splits `train` (1,438 images) and `test` (359)."""

    name = "sklearn_digits"
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


def prepare_digits(folder: Path) -> str:
    """Writes the set to a data folder, whose path it returns."""
    tfds.disable_progress_bar()
    offline = tfds.download.DownloadConfig(try_download_gcs=False)
    # tfds prints what it downloads, and warns of a folder that is only being filled
    with quiet("absl"), contextlib.redirect_stdout(io.StringIO()):
        SklearnDigits(data_dir=folder, file_format="array_record").download_and_prepare(download_config=offline)
    return str(folder)
