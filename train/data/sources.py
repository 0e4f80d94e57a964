"""What the input pipeline reads from: random-access sources of encoded images with their classes.

A source has a length and returns for an index `{"image": encoded bytes, "label": int, "name": str}`. Sources are
picklable, so that worker processes read for themselves. Where one image cannot be read they raise UnreadableImage, and
DataError where there is no point in going on.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from convert.errors import UserError
from crossvit_jax.preprocess import UnreadableImage, read_image_file

TRAIN_SPLIT = "train"
HELD_OUT_SPLITS = ("validation", "val", "test")  # the first that is there
_LABELS_AT_A_TIME = 1024  # records that are in memory


class DataError(UserError):
    """The data set cannot be used any further; the message is one line and names it."""

    status = 1


class WorkersFailed(UserError):
    """Worker processes cannot be started, or one of them has died; the message is one line that says why."""

    status = 1


@runtime_checkable
class Source(Protocol):
    """What the input pipeline reads from."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


def read_file(root: str, path: str) -> bytes:
    """A file of the data set in a folder `root`. Raises UnreadableImage, or DataError if the data set has gone."""
    try:
        return read_image_file(path)
    except OSError as error:
        if _is_gone(root):
            raise DataError(f"the data set is gone: {root} is missing, empty or unreadable") from error
        raise UnreadableImage(path, error.strerror or str(error)) from error


def _is_gone(root: str) -> bool:
    """Also true for the empty folder that an unmounted disk leaves."""
    try:
        with os.scandir(root) as entries:
            return next(entries, None) is None
    except OSError:
        return True


@dataclass(frozen=True)
class Matched:
    """A source of images whose labels are other numbers: `classes[label]` in place of each label."""

    source: Source
    classes: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.source[index]
        return {**sample, "label": self.classes[sample["label"]]}


def image_names(source: Source) -> list[str]:
    """A name for each image: its path where it is a file, else its index."""
    if hasattr(source, "source"):  # `Matched` and its like
        return image_names(source.source)
    return source.paths() if hasattr(source, "paths") else [str(index) for index in range(len(source))]


def image_labels(source: Source) -> Int[np.ndarray, " images"]:
    """The labels of all images in their order. Of tensorflow-datasets sets every record is read for that."""
    if isinstance(source, Matched):
        return np.array(source.classes)[image_labels(source.source)]
    if not callable(source.labels):
        return np.asarray(source.labels)
    starts = range(0, len(source), _LABELS_AT_A_TIME)
    ends = (min(start + _LABELS_AT_A_TIME, len(source)) for start in starts)
    return np.concatenate(
        [source.labels(range(start, end)) for start, end in zip(starts, ends, strict=True)], dtype=np.int64
    )


@dataclass(frozen=True)
class ImageSets:
    """A data set: training and held-out images, and the names of the classes in the order of the labels.

    `notes` are lines for the user on what was found. `sorted_by_name`: the order of the classes is not that of the data
    set itself, but was made by sorting their names.

    `fingerprint` tells whether a run goes on with the images that it began with: it changes with their number, names,
    labels and sides, not with the place where they are kept. Their pixels are not looked at.
    """

    train: Source
    held_out: Source
    class_names: tuple[str, ...]
    held_out_split: str  # where the held-out images come from, to be told to the user
    fingerprint: str
    notes: tuple[str, ...] = ()
    sorted_by_name: bool = False

    def in_order(self, class_names: Sequence[str]) -> "ImageSets":
        """The same images with the classes in another order of the same names, each of which stands for one class."""
        if tuple(class_names) == self.class_names:
            return self
        places = tuple(class_names.index(name) for name in self.class_names)
        return dataclasses.replace(
            self,
            train=Matched(self.train, places),
            held_out=Matched(self.held_out, places),
            class_names=tuple(class_names),
            fingerprint=hashlib.sha256(json.dumps([self.fingerprint, *class_names]).encode()).hexdigest(),
        )
