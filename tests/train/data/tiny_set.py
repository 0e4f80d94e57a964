"""A small tensorflow-datasets set to be read."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds


def prepare_tiny(
    folder: Path,
    features: Mapping[str, Any],
    example: Callable[[int], Mapping[str, Any]],
    splits: Mapping[str, int],
    file_format: str = "array_record",
) -> None:
    """Prepares the set `tiny` in a data folder: of each split so many examples, by their number from 0."""

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        name = "tiny"
        pkg_dir_path = None

        def _info(self):
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(count) for split, count in splits.items()}

        def _generate_examples(self, count):
            for i in range(count):
                yield i, example(i)

    tfds.disable_progress_bar()
    offline = tfds.download.DownloadConfig(try_download_gcs=False)
    Tiny(data_dir=folder, file_format=file_format).download_and_prepare(download_config=offline)
