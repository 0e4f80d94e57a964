"""Image classification sets of Hugging Face `datasets`, from its hub or from a folder, as sources."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from convert.errors import SettingsError, listed, one_line, quiet, require
from convert.files import HF_PREFIX, shown
from crossvit_jax.files import check_regular
from crossvit_jax.preprocess import UnreadableImage, read_image_file
from train.data.held_out import draw_of_each_class
from train.data.sources import HELD_OUT_SPLITS, TRAIN_SPLIT, DataError, ImageSets

# the names that are preferred where several columns would do
_IMAGE_NAMES, _LABEL_NAMES = ("image", "img"), ("label", "labels", "fine_label")
_SPLITS = {"val": ("validation", "val"), "test": ("test",)}
_NAME = re.compile(r"(?P<name>[^@:]+)(:(?P<config>[^@:]+))?(@(?P<revision>[^@:]+))?")


class HuggingFaceSource:
    """One split, or a part of it, images still encoded."""

    def __init__(self, table: Any, image: str, labels: Int[np.ndarray, " images"], split: str, indices: np.ndarray):
        """
        Args:
            table: a `datasets.Dataset` whose column `image` is not decoded.
            labels: of the images at `indices`.
            indices: rows of the table.
        """
        self._table, self._image, self._split = table, image, split
        self.labels, self._indices = labels, indices

    def part(self, places: Int[np.ndarray, " images"]) -> "HuggingFaceSource":
        """The images at these places alone."""
        return HuggingFaceSource(self._table, self._image, self.labels[places], self._split, self._indices[places])

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises UnreadableImage for a row without a picture, DataError if the data set has gone."""
        row = int(self._indices[index])
        name = f"{row} of split {self._split}"
        try:
            stored = self._table[row][self._image] or {}
            encoded = stored.get("bytes") or (read_image_file(stored["path"]) if stored.get("path") else b"")
        except OSError as error:
            if any(not os.path.exists(file["filename"]) for file in self._table.cache_files):
                raise DataError("the data set is gone: its files are missing") from error
            raise UnreadableImage(name, error.strerror or one_line(error)) from error
        if not encoded:
            raise UnreadableImage(name, "it is empty")
        return {"image": encoded, "label": int(self.labels[index]), "name": name}


def open_huggingface(name: str, *, val_fraction: float, seed: int) -> ImageSets:
    """A data set of the hub, `OWNER/NAME`, also `:CONFIG` and `@REVISION` behind it; or one in a folder.

    A folder holds what `save_to_disk` writes, or files that `load_dataset` reads, such as Parquet. Of the hub, the
    package downloads into its cache. Code of a data set's own is never run.

    Held out is the first of validation, val and test; where there is none, of each class the share `val_fraction`,
    chosen by `seed`.

    Raises MissingExtra if the package is missing, SettingsError if there is no such data set, it cannot be read or
    downloaded, or is none of images with one label each.
    """
    splits = _load(name)
    if TRAIN_SPLIT not in splits:
        raise SettingsError(f"data set {HF_PREFIX}{name} needs a split {TRAIN_SPLIT!r}; it has {_told(splits)}")
    held_out_split = next((split for split in HELD_OUT_SPLITS if split in splits), None)
    chosen = [split for split in (TRAIN_SPLIT, held_out_split) if split is not None]
    opened, class_names, is_sorted = _open(name, splits, chosen)
    train = opened[TRAIN_SPLIT]
    if held_out_split is not None:
        held_out = opened[held_out_split]
    else:
        sizes = np.bincount(train.labels, minlength=len(class_names))
        if (sizes == 1).any():
            single = [class_names[place] for place in np.flatnonzero(sizes == 1)]
            raise SettingsError(
                f"data set {HF_PREFIX}{name} cannot be split: a class needs two images or more, unlike "
                f"{listed(map(shown, single[:5]), len(single))}"
            )
        held = draw_of_each_class(train.labels, fraction=val_fraction, seed=seed)
        train, held_out = (train.part(np.flatnonzero(side)) for side in (~held, held))
    return ImageSets(
        train,
        held_out,
        class_names,
        held_out_split or f"{val_fraction:.0%} of each class",
        _fingerprint(class_names, train, held_out),
        sorted_by_name=is_sorted,
    )


def open_huggingface_split(name: str, split: str) -> tuple[HuggingFaceSource, tuple[str, ...], bool]:
    """The images of one split, `val` or `test`, of a data set as `open_huggingface` takes it.

    Returns:
        The images, the names of the classes in the order of the labels, and whether these are sorted.

    Raises as `open_huggingface`, and SettingsError where there is no such split.
    """
    splits = _load(name)
    wanted = next((known for known in _SPLITS[split] if known in splits), None)
    if wanted is None:
        raise SettingsError(f"data set {HF_PREFIX}{name} has no split {split}; it has {_told(splits)}")
    chosen = [known for known in (TRAIN_SPLIT, wanted) if known in splits]  # the first tells the classes
    opened, class_names, is_sorted = _open(name, splits, chosen)
    return opened[wanted], class_names, is_sorted


def _open(
    name: str, splits: dict[str, Any], chosen: Sequence[str]
) -> tuple[dict[str, HuggingFaceSource], tuple[str, ...], bool]:
    """All images of some splits, the names of the classes, which the first of these tells, and whether they are sorted.

    Raises SettingsError.
    """
    import datasets  # late: it is an extra's

    features = splits[chosen[0]].features
    image, label = _columns(datasets, name, features)
    for split in chosen:
        if {image, label} - set(splits[split].features):
            raise SettingsError(f"split {split!r} of data set {HF_PREFIX}{name} has no columns {image!r} and {label!r}")
    found = {split: _label_column(splits[split], label) for split in chosen}
    class_names, labels, is_sorted = _classes(datasets, name, features[label], found)
    opened = {}
    for split in chosen:
        table = splits[split].select_columns([image]).cast_column(image, datasets.Image(decode=False))
        opened[split] = HuggingFaceSource(table, image, labels[split], split, np.arange(len(labels[split])))
    return opened, class_names, is_sorted


def _told(splits: dict[str, Any]) -> str:
    return listed(map(repr, splits)) or "none"


def _load(name: str) -> dict[str, Any]:
    """The splits of a data set that have images, by name. Raises MissingExtra, SettingsError."""
    require(f"--dataset {HF_PREFIX}{name}", "datasets")
    import datasets  # late: it is an extra's

    datasets.disable_progress_bars()
    try:
        with quiet("datasets"), quiet("huggingface_hub"):
            folder = Path(name)
            if folder.is_dir():
                check_regular(folder)
                is_saved = (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()
                found = datasets.load_from_disk(name) if is_saved else datasets.load_dataset(name)
            else:
                asked = _NAME.fullmatch(name)
                if asked is None or name.startswith(("/", ".")):
                    raise SettingsError(
                        f"--dataset {HF_PREFIX}{shown(name)}: there is no such folder, and a data set of the hub is "
                        "OWNER/NAME, OWNER/NAME:CONFIG or OWNER/NAME@REVISION"
                    )
                found = datasets.load_dataset(asked["name"], asked["config"], revision=asked["revision"])
    except SettingsError:
        raise
    except Exception as error:  # its readers and its HTTP client raise what they like
        raise SettingsError(f"data set {HF_PREFIX}{shown(name)} cannot be opened: {one_line(error)}") from None
    splits = dict(found) if isinstance(found, dict) else {TRAIN_SPLIT: found}
    return {str(split): table for split, table in splits.items() if len(table)}


def _columns(datasets: Any, name: str, features: Any) -> tuple[str, str]:
    """The columns of the image and of its class."""
    images = [key for key, feature in features.items() if isinstance(feature, datasets.Image)]
    labels = [key for key, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    texts = ("string", "large_string")
    labels = labels or [key for key in _LABEL_NAMES if getattr(features.get(key), "dtype", None) in texts]
    image, label = _one_of(images, _IMAGE_NAMES), _one_of(labels, _LABEL_NAMES)
    if image is None or label is None:
        raise SettingsError(
            f"data set {HF_PREFIX}{name} is no image classification set: it needs one column of images, and one of "
            f"class labels or of names called {' or '.join(_LABEL_NAMES)}; it has {', '.join(sorted(features))}"
        )
    return image, label


def _one_of(found: Sequence[str], preferred: Sequence[str]) -> str | None:
    """The only one, or the first that is preferred."""
    return found[0] if len(found) == 1 else next((name for name in preferred if name in found), None)


def _label_column(table: Any, label: str) -> np.ndarray:
    return np.asarray(table.select_columns([label]).with_format("numpy")[:][label])


def _classes(
    datasets: Any, name: str, feature: Any, found: dict[str, np.ndarray]
) -> tuple[tuple[str, ...], dict[str, Int[np.ndarray, " images"]], bool]:
    """The names of the classes, the labels of each split, and whether the names were sorted."""
    if isinstance(feature, datasets.ClassLabel):
        names = tuple(feature.names)
        for split, labels in found.items():
            missing = np.flatnonzero(
                [label is None or label != label for label in labels]
            )  # None, as NaN among numbers
            if len(missing):
                raise SettingsError(f"image {missing[0]} of split {split!r} of data set {HF_PREFIX}{name} has no label")
            wrong = np.flatnonzero((labels < 0) | (labels >= len(names)))
            if len(wrong):
                raise SettingsError(
                    f"image {wrong[0]} of split {split!r} of data set {HF_PREFIX}{name} has label {labels[wrong[0]]}: "
                    f"there are {len(names)} classes, numbered from 0"
                )
        return names, {split: labels.astype(np.int64) for split, labels in found.items()}, False
    for split, labels in found.items():
        missing = [place for place, text in enumerate(labels) if not isinstance(text, str) or not text]
        if missing:
            raise SettingsError(f"image {missing[0]} of split {split!r} of data set {HF_PREFIX}{name} has no label")
    names = tuple(sorted(set(next(iter(found.values())))))
    places = {text: place for place, text in enumerate(names)}
    unknown = sorted({text for labels in found.values() for text in labels} - set(names))
    if unknown:
        told = listed(map(shown, unknown[:5]), len(unknown))
        raise SettingsError(f"data set {HF_PREFIX}{name} has held-out classes that are missing in training: {told}")
    return names, {split: np.array([places[text] for text in labels]) for split, labels in found.items()}, True


def _fingerprint(class_names: tuple[str, ...], *sources: HuggingFaceSource) -> str:
    """Of the names of the classes, and of the labels on either side in their order."""
    sums = [hashlib.sha256(source.labels.astype("<i8").tobytes()).hexdigest() for source in sources]
    return hashlib.sha256(json.dumps([class_names, *sums]).encode()).hexdigest()
