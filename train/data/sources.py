"""What the input pipeline reads from: random-access sources of encoded images with their classes.

A source has a length and returns for an index `{"image": encoded bytes, "label": int, "name": str}`. Sources are
picklable, so that worker processes read for themselves. Where one image cannot be read they raise UnreadableImage, and
DataError where there is no point in going on.
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from convert.errors import UserError

TRAIN_SPLIT = "train"
HELD_OUT_SPLITS = ("validation", "val", "test")  # the first that is there


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
