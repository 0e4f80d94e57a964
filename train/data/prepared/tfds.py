"""Prepared tensorflow-datasets sets as sources. They are read without TensorFlow."""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convert.errors import SettingsError
from crossvit_jax.files import check_regular
from crossvit_jax.preprocess import UnreadableImage
from train.data.sources import HELD_OUT_SPLITS, TRAIN_SPLIT, DataError, ImageSets

# labels are looked at before a run: all of a small split, some evenly spread ones of a larger
_SMALL_SPLIT = 8 * 2**20  # bytes on disk
_LABELS_OF_LARGE_SPLIT = 256


class TfdsSource:
    """One split of a prepared tensorflow-datasets set, images still encoded. Reads without TensorFlow."""

    def __init__(self, builder: Any, split: str, image: str, label: str):
        import tensorflow_datasets as tfds

        self._records = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        # only these two are read from a record: other features may need TensorFlow to decode, or just time
        self._features = tfds.features.FeaturesDict({key: builder.info.features[key] for key in (image, label)})
        self._decoders = {image: tfds.decode.SkipDecoding()}
        self._image, self._label, self._split = image, label, split
        self._num_classes = builder.info.features[label].num_classes
        self._folder = builder.data_path

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises UnreadableImage for a damaged record, DataError for a wrong label or a data set that is gone."""
        name = f"{index} of split {self._split}"
        try:
            record = self._records[index]
        except (OSError, RuntimeError) as error:  # what array_record raises
            if not self._folder.exists():
                raise DataError(f"the data set is gone: there is no folder {self._folder} any more") from error
            raise UnreadableImage(name, str(error)) from error
        example = self._features.deserialize_example_np(record, decoders=self._decoders)
        label = int(example[self._label])
        if not 0 <= label < self._num_classes:
            raise DataError(f"image {name} in {self._folder} has label {label}: there are {self._num_classes} classes")
        return {"image": example[self._image], "label": label, "name": name}

    def labels(self, indices: Sequence[int]) -> list[int]:
        """The labels of some images as they are, right or wrong. Quicker than reading the images."""
        import tensorflow_datasets as tfds

        label = tfds.features.FeaturesDict({self._label: self._features[self._label]})
        records = self._records.__getitems__(indices)
        return [int(label.deserialize_example_np(record)[self._label]) for record in records]


def open_tfds(name: str, data_dir: str | None) -> ImageSets:
    """A tensorflow-datasets image classification set, prepared before in a format with random access.

    Args:
        name: as tensorflow-datasets takes it: `cifar10`, `imagenet2012:5.1.0`, `imagenet_v2/matched-frequency`.
        data_dir: where it was prepared; none: tensorflow-datasets' own folder.

    Raises SettingsError as `open_image_sets` does.
    """

    builder = prepared_builder(name, data_dir)
    splits = {split for split, info in builder.info.splits.items() if info.num_examples}
    held_out_split = next((split for split in HELD_OUT_SPLITS if split in splits), None)
    if TRAIN_SPLIT not in splits or held_out_split is None:
        raise SettingsError(
            f"data set {name} needs a split {TRAIN_SPLIT!r} and one of {', '.join(map(repr, HELD_OUT_SPLITS))}; "
            f"it has {', '.join(map(repr, sorted(splits))) or 'none'}"
        )
    image, label = _image_and_label(name, builder.info)
    try:
        train = TfdsSource(builder, TRAIN_SPLIT, image, label)
        held_out = TfdsSource(builder, held_out_split, image, label)
    except NotImplementedError as error:
        raise SettingsError(
            f"data set {name} in {builder.data_dir} is stored as {builder.info.file_format.value}, which cannot be "
            'read at random; prepare it again with file_format="array_record"'
        ) from error
    class_names = tuple(builder.info.features[label].names or map(str, range(builder.info.features[label].num_classes)))
    for split, source in ((TRAIN_SPLIT, train), (held_out_split, held_out)):
        _check_labels(name, split, source, len(class_names), small=builder.info.splits[split].num_bytes <= _SMALL_SPLIT)
    fingerprint = f"{builder.info.full_name} {TRAIN_SPLIT}={len(train)} {held_out_split}={len(held_out)}"
    return ImageSets(train, held_out, class_names, held_out_split, fingerprint)


def data_folder(data_dir: str | None) -> str:
    """Where prepared data sets lie: `data_dir`, or tensorflow-datasets' own folder.

    Raises SettingsError if that is in the home folder, and the user has none, as in many containers.
    """
    import tensorflow_datasets as tfds

    where = os.path.expanduser(data_dir or tfds.core.constants.DATA_DIR)  # leaves `~` as it is where there is none
    if data_dir is None and where.startswith("~/"):
        raise SettingsError("there is no home folder, in which prepared data sets lie: name another with --data-dir")
    return where


def check_prepared(where: str, name: str) -> None:
    """Raises SettingsError if what lies where a data set is prepared is not all regular files, such as a named pipe."""
    folder = Path(where, name)
    try:
        if folder.is_dir():
            check_regular(folder)
    except OSError as error:
        raise SettingsError(f"data set {name} cannot be read: {error.filename}: {error.strerror}") from error


def _check_labels(name: str, split: str, source: TfdsSource, num_classes: int, *, small: bool) -> None:
    count = len(source) if small else min(_LABELS_OF_LARGE_SPLIT, len(source))
    indices = np.linspace(0, len(source) - 1, count, dtype=int).tolist()
    try:
        labels = source.labels(indices)
    except (OSError, RuntimeError) as error:
        raise SettingsError(f"split {split!r} of data set {name} cannot be read: {error}") from error
    if set(labels) == {-1}:  # how tfds marks labels that nobody knows
        raise SettingsError(f"split {split!r} of data set {name} has no labels (they are -1)")
    wrong = next((place for place, label in enumerate(labels) if not 0 <= label < num_classes), None)
    if wrong is not None:
        raise SettingsError(
            f"image {indices[wrong]} of split {split!r} of data set {name} has label {labels[wrong]}: "
            f"there are {num_classes} classes, numbered from 0"
        )


def prepared_builder(
    name: str,
    data_dir: str | None,
    *,
    accepted: str = "digits, folder:PATH, csv:FILE, hf:NAME, or a tensorflow-datasets name",
) -> Any:
    """tensorflow-datasets' builder of a set that was prepared before. Raises SettingsError if there is none.

    Args:
        accepted: what may be asked for instead, in words.
    """
    import tensorflow_datasets as tfds

    where = data_folder(data_dir)
    if data_dir is not None and not Path(data_dir).is_dir():
        raise SettingsError(f"there is no folder {data_dir} (--data-dir)")
    bare = name.split("/")[0].split(":")[0]
    check_prepared(where, bare)
    try:
        # from its files alone: the code of a data set may be missing here, or import TensorFlow
        return tfds.core.read_only_builder.builder_from_files(name, data_dir=data_dir)
    except (tfds.core.registered.DatasetNotFoundError, ValueError):
        pass
    prepared = sorted(path.name for path in Path(where).glob("[!.]*") if any(path.glob("**/dataset_info.json")))
    known = set(tfds.list_builders(with_community_datasets=False))
    if bare in known or bare in prepared:
        others = f"; prepared there: {', '.join(prepared)}" if prepared else ""
        raise SettingsError(
            f"data set {name} is not prepared in {where}{others}. Prepare it with tensorflow-datasets' "
            'download_and_prepare and file_format="array_record", or name another folder with --data-dir'
        )
    near = difflib.get_close_matches(bare, sorted(known | set(prepared) | {"digits"}), n=1)
    hint = f"; did you mean {near[0]!r}?" if near and not name.endswith("/") else ", and there is no such folder."
    raise SettingsError(f"unknown data set {name!r}{hint} Accepted: {accepted}")


def _image_and_label(name: str, info: Any) -> tuple[str, str]:
    """The keys of the image and of its class. The supervised keys, if they are that, or else the only such features."""
    import tensorflow_datasets as tfds

    images = [key for key, feature in info.features.items() if type(feature) is tfds.features.Image]
    labels = [key for key, feature in info.features.items() if type(feature) is tfds.features.ClassLabel]
    for pair in (info.supervised_keys, (images[0], labels[0]) if len(images) == len(labels) == 1 else None):
        if pair is not None and len(pair) == 2 and pair[0] in images and pair[1] in labels:
            return pair[0], pair[1]
    raise SettingsError(
        f"data set {name} is no image classification set: it needs one image and one class label per example; "
        f"it has {', '.join(sorted(info.features))}"
    )
