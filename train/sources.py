"""Image classification data sets as random-access sources of encoded images: digits, tensorflow-datasets, folders.

A source has a length and returns for an index `{"image": encoded bytes, "label": int, "name": str}`. Sources are
picklable, so that worker processes read for themselves.
"""

import contextlib
import difflib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import absl.logging
import numpy as np

from train.config import SettingsError, TrainConfig

FOLDER_PREFIX = "folder:"
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_TRAIN_SPLIT = "train"
_HELD_OUT_SPLITS = ("validation", "val", "test")  # the first that is there


@runtime_checkable
class Source(Protocol):
    """What the input pipeline reads from."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


@dataclass(frozen=True)
class ImageSets:
    """A data set: training and held-out images, and the names of the classes in the order of the labels."""

    train: Source
    held_out: Source
    class_names: tuple[str, ...]
    held_out_split: str  # where the held-out images come from, to be told to the user


def open_image_sets(config: TrainConfig) -> ImageSets:
    """Open the data set that a run asks for.

    Raises SettingsError, saying what is wrong and what would work, if it is unknown, not prepared, cannot be read at
    random, has no labels or no images.
    """
    if config.dataset.startswith(FOLDER_PREFIX):
        root = Path(config.dataset.removeprefix(FOLDER_PREFIX))
        return open_folder(root, val_fraction=config.val_fraction, seed=config.seed)
    if config.dataset == "digits":
        return open_digits(config.data_dir)
    return open_tfds(config.dataset, config.data_dir)


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

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self._features.deserialize_example_np(self._records[index], decoders=self._decoders)
        name = f"{index} of split {self._split}"
        return {"image": example[self._image], "label": int(example[self._label]), "name": name}


def open_digits(data_dir: str | None) -> ImageSets:
    """scikit-learn's digits, written to `data_dir` (none: tensorflow-datasets' own folder) the first time."""
    import tensorflow_datasets as tfds

    from train.digits import SklearnDigits

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
        first = source[0]["label"]  # tfds marks missing labels with -1, in all examples of a split
        if not 0 <= first < len(class_names):
            raise SettingsError(f"split {split!r} of data set {name} has no labels (the first is {first})")
    return ImageSets(train, held_out, class_names, held_out_split)


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
    prepared = sorted(
        path.name for path in Path(where).expanduser().glob("[!.]*") if any(path.glob("**/dataset_info.json"))
    )
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
        index = int(index)
        path = os.path.join(self.root, self.files[index])
        with open(path, "rb") as file:
            return {"image": file.read(), "label": int(self.labels[index]), "name": path}


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
            raise SettingsError(f"{root} has classes in {there}/ that are missing in {here}/: {', '.join(missing)}")
    return ImageSets(
        _folder_source(root / _TRAIN_SPLIT, train),
        _folder_source(root / held_out_split, held_out),
        tuple(train),
        held_out_split,
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
    if empty:
        raise SettingsError(
            f"no images in {', '.join(str(root / name) for name in empty)} (looked for {' '.join(IMAGE_SUFFIXES)})"
        )
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
        raise SettingsError(f"{root} cannot be split: a class needs two images or more, unlike {', '.join(single)}")
    rng = np.random.default_rng(seed)
    train, held_out = {}, {}
    for name, files in images.items():
        count = min(max(1, round(val_fraction * len(files))), len(files) - 1)
        chosen = set(rng.permutation(len(files))[:count].tolist())
        train[name] = [file for index, file in enumerate(files) if index not in chosen]
        held_out[name] = [file for index, file in enumerate(files) if index in chosen]
    split = f"{val_fraction:.0%} of each class"
    return ImageSets(_folder_source(root, train), _folder_source(root, held_out), tuple(images), split)


def _folder_source(root: Path, images: dict[str, Sequence[str]]) -> FolderSource:
    labels = np.repeat(np.arange(len(images)), [len(files) for files in images.values()])
    return FolderSource(str(root), tuple(file for files in images.values() for file in files), labels)
