"""What data sets for detection and segmentation have in common: their sources, and a data set with both sides."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from convert.errors import SettingsError
from crossvit_jax.files import open_regular
from crossvit_jax.preprocess import FORMATS, Exif, orientation, read_image_file
from train.data.sources import ImageSets
from train.images.geometry import IGNORED

Kind = Literal["detection", "segmentation"]


@runtime_checkable
class DenseSource(Protocol):
    """A source, as in `train.data.sources`, of pictures with boxes or masks.

    A sample holds `image` (encoded bytes) and `name` (str); for detection also `objects`
    (`train.images.geometry.Boxes`) and `size` (height, width: of the picture that they are for), for segmentation
    `segments` (height, width) uint8 with `train.images.geometry.IGNORED` where nothing is asked.

    `endless`: there is a sample for every index from 0 on, and `len` tells what an epoch has.
    """

    endless: bool

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def truth(self, index: int) -> dict[str, Any]:
        """The sample without its image, read as quickly as that allows, and `image_id`: an int by which results name
        the picture. Raises UnreadableImage as the source does."""


@dataclass(frozen=True)
class DenseSets(ImageSets):
    """A data set for detection or segmentation; its sources are `DenseSource`s."""

    kind: Kind = "detection"
    most_boxes: int = 0  # the largest number of objects in a picture of either side, crowds left out; at least 1
    category_ids: tuple[int, ...] = ()  # by which the data set's own files and results name the classes, in their order

    def in_order(self, class_names: Sequence[str]) -> "DenseSets":
        """Itself: boxes and masks keep the order of their data set. Raises SettingsError for another one."""
        if tuple(class_names) != self.class_names:
            raise SettingsError("the classes of boxes and masks are in the order of their data set: no other is taken")
        return self


@dataclass(frozen=True)
class Reclassed:
    """A source whose classes are other numbers: `classes[class]` in place of each class."""

    source: DenseSource
    classes: tuple[int, ...]

    endless = False

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._reclassed(self.source[index])

    def truth(self, index: int) -> dict[str, Any]:
        return self._reclassed(self.source.truth(index))

    def _reclassed(self, sample: dict[str, Any]) -> dict[str, Any]:
        if "segments" in sample:
            table = np.full(256, IGNORED, np.uint8)
            table[: len(self.classes)] = self.classes
            return {**sample, "segments": table[sample["segments"]]}
        objects = sample["objects"]
        return {**sample, "objects": objects._replace(classes=np.asarray(self.classes, np.int32)[objects.classes])}


def picture_size(path: str, exif: Exif) -> tuple[int, int] | None:
    """Height and width of a picture in a file as the model sees it; None where it cannot be read."""
    try:
        with open_regular(path) as file, Image.open(file, formats=FORMATS) as image:
            width, height = image.size
        if exif == "apply" and width != height and orientation(read_image_file(path)) >= 5:
            return width, height
    except Exception:  # whatever Pillow's parsers raise
        return None
    return height, width
