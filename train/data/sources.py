"""Image classification data sets as random-access sources of encoded images: digits, tensorflow-datasets, folders.

A source has a length and returns for an index `{"image": encoded bytes, "label": int, "name": str}`. Sources are
picklable, so that worker processes read for themselves. Where one image cannot be read they raise UnreadableImage, and
DataError where there is no point in going on.
"""

import contextlib
import difflib
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import absl.logging
import numpy as np

from convert.errors import SettingsError, UserError
from convert.paths import FOLDER_PREFIX
from train.config import TrainConfig
from train.images.decode import UnreadableImage

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_TRAIN_SPLIT = "train"
_HELD_OUT_SPLITS = ("validation", "val", "test")  # the first that is there
_NAMES_IN_A_MESSAGE = 20
# of prepared sets, labels are looked at before a run: all of a small split, some evenly spread ones of a larger
_SMALL_SPLIT = 8 * 2**20  # bytes on disk
_LABELS_OF_LARGE_SPLIT = 256


class DataError(UserError):
    """The data set cannot be used any further; the message is one line and names it."""

    status = 1


@runtime_checkable
class Source(Protocol):
    """What the input pipeline reads from."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


@dataclass(frozen=True)
class ImageSets:
    """A data set: training and held-out images, and the names of the classes in the order of the labels.

    `fingerprint` tells whether a run goes on with the images that it began with: it changes with their number, names,
    labels and sides, not with the place where they are kept. Their pixels are not looked at.
    """

    train: Source
    held_out: Source
    class_names: tuple[str, ...]
    held_out_split: str  # where the held-out images come from, to be told to the user
    fingerprint: str


def open_image_sets(config: TrainConfig) -> ImageSets:
    """Open the data set that a run asks for.

    Raises SettingsError, saying what is wrong and what would work, if it is unknown, not prepared, cannot be read at
    random, has no images, a class without images in a folder, or labels that are missing or stand for no class.
    """
    if config.dataset.startswith(FOLDER_PREFIX):
        root = Path(config.dataset.removeprefix(FOLDER_PREFIX))
        return open_folder(root, val_fraction=config.val_fraction, seed=config.seed)
    if config.dataset == "digits":
        return open_digits(config.data_dir)
    return open_tfds(config.dataset, config.data_dir)


def listed(names: Iterable[str], count: int | None = None) -> str:
    """Names for a message, at most 20 of them: `a, b, c`, or `a, b, … and 7 more`.

    Args:
        count: how many there are, where not all names are known.
    """
    names = list(names)
    shown = names[:_NAMES_IN_A_MESSAGE]
    more = (len(names) if count is None else count) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


# --- tensorflow-datasets ---


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


def open_digits(data_dir: str | None) -> ImageSets:
    """scikit-learn's digits, written to `data_dir` (none: tensorflow-datasets' own folder) the first time."""
    import tensorflow_datasets as tfds

    from train.data.digits import SklearnDigits

    try:
        with _quiet():
            builder = SklearnDigits(data_dir=data_dir, file_format="array_record")
            if not builder.is_prepared():
                _prepare(builder)
    except OSError as error:
        where = data_dir or tfds.core.constants.DATA_DIR
        raise SettingsError(f"cannot prepare the digits in {where}: {error}; try another --data-dir") from error
    return open_tfds("sklearn_digits", data_dir)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what tfds prints about a download, and its warnings about a folder that is only being filled."""
    before = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        absl.logging.set_verbosity(before)


def _prepare(builder: Any) -> None:
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    offline = tfds.download.DownloadConfig(try_download_gcs=False)
    try:
        builder.download_and_prepare(download_config=offline)
    except OSError:
        # another process may have finished the same work just before
        if not type(builder)(data_dir=builder.data_dir_root, file_format="array_record").is_prepared():
            raise


def open_tfds(name: str, data_dir: str | None) -> ImageSets:
    """A tensorflow-datasets image classification set, prepared before in a format with random access.

    Args:
        name: as tensorflow-datasets takes it: `cifar10`, `imagenet2012:5.1.0`, `imagenet_v2/matched-frequency`.
        data_dir: where it was prepared; none: tensorflow-datasets' own folder.

    Raises SettingsError as `open_image_sets` does.
    """

    builder = _prepared_builder(name, data_dir)
    splits = {split for split, info in builder.info.splits.items() if info.num_examples}
    held_out_split = next((split for split in _HELD_OUT_SPLITS if split in splits), None)
    if _TRAIN_SPLIT not in splits or held_out_split is None:
        raise SettingsError(
            f"data set {name} needs a split {_TRAIN_SPLIT!r} and one of {', '.join(map(repr, _HELD_OUT_SPLITS))}; "
            f"it has {', '.join(map(repr, sorted(splits))) or 'none'}"
        )
    image, label = _image_and_label(name, builder.info)
    try:
        train = TfdsSource(builder, _TRAIN_SPLIT, image, label)
        held_out = TfdsSource(builder, held_out_split, image, label)
    except NotImplementedError as error:
        raise SettingsError(
            f"data set {name} in {builder.data_dir} is stored as {builder.info.file_format.value}, which cannot be "
            'read at random; prepare it again with file_format="array_record"'
        ) from error
    class_names = tuple(builder.info.features[label].names or map(str, range(builder.info.features[label].num_classes)))
    for split, source in ((_TRAIN_SPLIT, train), (held_out_split, held_out)):
        _check_labels(name, split, source, len(class_names), small=builder.info.splits[split].num_bytes <= _SMALL_SPLIT)
    fingerprint = f"{builder.info.full_name} {_TRAIN_SPLIT}={len(train)} {held_out_split}={len(held_out)}"
    return ImageSets(train, held_out, class_names, held_out_split, fingerprint)


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


def _prepared_builder(name: str, data_dir: str | None) -> Any:
    import tensorflow_datasets as tfds

    where = data_dir or tfds.core.constants.DATA_DIR
    if data_dir is not None and not Path(data_dir).is_dir():
        raise SettingsError(f"there is no folder {data_dir} (--data-dir)")
    try:
        # from its files alone: the code of a data set may be missing here, or import TensorFlow
        return tfds.core.read_only_builder.builder_from_files(name, data_dir=data_dir)
    except (tfds.core.registered.DatasetNotFoundError, ValueError):
        pass
    bare = name.split("/")[0].split(":")[0]
    folder = Path(os.path.expanduser(where))  # which, unlike pathlib's, leaves ~name as it is where there is no name
    prepared = sorted(path.name for path in folder.glob("[!.]*") if any(path.glob("**/dataset_info.json")))
    known = set(tfds.list_builders(with_community_datasets=False))
    if bare in known or bare in prepared:
        listed = f"; prepared there: {', '.join(prepared)}" if prepared else ""
        raise SettingsError(
            f"data set {name} is not prepared in {where}{listed}. Prepare it with tensorflow-datasets' "
            'download_and_prepare and file_format="array_record", or name another folder with --data-dir'
        )
    near = difflib.get_close_matches(bare, sorted(known | set(prepared) | {"digits"}), n=1, cutoff=0.0)[0]
    raise SettingsError(
        f"unknown data set {name!r}; did you mean {near!r}? "
        "Accepted: digits, a tensorflow-datasets name, or folder:PATH"
    )


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


# --- folders of class folders ---


@dataclass(frozen=True)
class FolderSource:
    """Image files with their labels."""

    root: str
    files: tuple[str, ...]  # relative to root
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises UnreadableImage for a file that cannot be read, DataError if they all have gone."""
        index = int(index)
        path = os.path.join(self.root, self.files[index])
        try:
            with open(path, "rb") as file:
                encoded = file.read()
        except OSError as error:
            if _is_gone(self.root):
                raise DataError(f"the data set is gone: {self.root} is missing, empty or unreadable") from error
            raise UnreadableImage(path, error.strerror or str(error)) from error
        return {"image": encoded, "label": int(self.labels[index]), "name": path}


def _is_gone(root: str) -> bool:
    """Also true for the empty folder that an unmounted disk leaves."""
    try:
        with os.scandir(root) as entries:
            return next(entries, None) is None
    except OSError:
        return True


def open_folder(root: Path, *, val_fraction: float, seed: int) -> ImageSets:
    """A folder with `train/` and `val/` (or `validation/`, `test/`) of class folders, or of class folders itself.

    The latter is split: of each class the share `val_fraction` is held out, at least one image, chosen by `seed`.
    Classes are the folders' names in alphabetical order. Images may lie deeper inside a class folder.

    Raises SettingsError if there is no such folder, no class, or a class without images on either side.
    """
    if not root.is_dir():
        raise SettingsError(f"there is no folder {root}")
    if not (root / _TRAIN_SPLIT).is_dir():
        return _split_folder(root, list_images(root), val_fraction=val_fraction, seed=seed)
    held_out_split = next((split for split in _HELD_OUT_SPLITS if (root / split).is_dir()), None)
    if held_out_split is None:
        raise SettingsError(f"{root} has a folder train/ but none of {', '.join(s + '/' for s in _HELD_OUT_SPLITS)}")
    train, held_out = list_images(root / _TRAIN_SPLIT), list_images(root / held_out_split)
    for here, files, there, other in (
        (_TRAIN_SPLIT, train, held_out_split, held_out),
        (held_out_split, held_out, _TRAIN_SPLIT, train),
    ):
        missing = sorted(set(other) - set(files))
        if missing:
            raise SettingsError(f"{root} has classes in {there}/ that are missing in {here}/: {listed(missing)}")
    return ImageSets(
        _folder_source(root / _TRAIN_SPLIT, train),
        _folder_source(root / held_out_split, held_out),
        tuple(train),
        held_out_split,
        _fingerprint(train, held_out),
    )


def list_images(root: Path) -> dict[str, list[str]]:
    """Class names in alphabetical order, and each one's image files relative to `root`, sorted.

    Raises SettingsError if there is no class folder, or one without images.
    """
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise SettingsError(f"{root} has no class folders: it should hold one folder of images per class")
    images = {name: _image_files(root, name) for name in classes}
    empty = [name for name, files in images.items() if not files]
    looked_for = f"(looked for {' '.join(IMAGE_SUFFIXES)})"
    if len(empty) == len(images):
        raise SettingsError(f"no images in any of the {len(images)} class folders of {root} {looked_for}")
    if empty:
        raise SettingsError(f"no images in {listed(str(root / name) for name in empty)} {looked_for}")
    return images


def _image_files(root: Path, class_name: str) -> list[str]:
    return sorted(
        os.path.relpath(os.path.join(folder, file), root)
        for folder, _, files in os.walk(root / class_name, followlinks=True)
        for file in files
        if file.lower().endswith(IMAGE_SUFFIXES) and not file.startswith(".")
    )


def _split_folder(root: Path, images: dict[str, list[str]], *, val_fraction: float, seed: int) -> ImageSets:
    single = [name for name, files in images.items() if len(files) < 2]
    if single:
        raise SettingsError(f"{root} cannot be split: a class needs two images or more, unlike {listed(single)}")
    rng = np.random.default_rng(seed)
    train, held_out = {}, {}
    for name, files in images.items():
        count = min(max(1, round(val_fraction * len(files))), len(files) - 1)
        chosen = set(rng.permutation(len(files))[:count].tolist())
        train[name] = [file for index, file in enumerate(files) if index not in chosen]
        held_out[name] = [file for index, file in enumerate(files) if index in chosen]
    split = f"{val_fraction:.0%} of each class"
    return ImageSets(
        _folder_source(root, train),
        _folder_source(root, held_out),
        tuple(images),
        split,
        _fingerprint(train, held_out),
    )


def _folder_source(root: Path, images: dict[str, Sequence[str]]) -> FolderSource:
    labels = np.repeat(np.arange(len(images)), [len(files) for files in images.values()])
    return FolderSource(str(root), tuple(file for files in images.values() for file in files), labels)


def _fingerprint(train: dict[str, list[str]], held_out: dict[str, list[str]]) -> str:
    """Of the names of all classes and files; which class and side a file belongs to is part of it."""
    return hashlib.sha256(json.dumps([list(train.items()), list(held_out.items())]).encode()).hexdigest()
