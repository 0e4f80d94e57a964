"""Pictures in files with boxes: the source that all formats of boxes end in, and what can be wrong with boxes."""

import dataclasses
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from convert.errors import SettingsError, listed
from convert.files import shown
from crossvit_jax.preprocess import Exif
from train.data.dense.samples import DenseSets, picture_size
from train.data.held_out import draw_held_out
from train.data.sources import read_file
from train.images.geometry import Boxes

_LOOKED_AT = 2000  # pictures whose size is compared with what is said of it before a run
_BEYOND = 1.0  # pixels that a box may reach out of its picture without a word: annotators' rounding
_UNREADABLE = (2**15, 2**15)  # the size of pictures whose own is not known: whatever their boxes are, they fit
_MOST_BOXES = 20_000  # of a picture: Ti at 240 pixels takes 2.2 GiB for a batch of 2 then
_MOST_BEYOND = 0.1  # of the boxes may reach farther; where more do, they are in another format


@dataclass(frozen=True, eq=False)
class BoxFiles:
    """Pictures in files, in which objects are known; see `train.data.dense.samples.DenseSource`.

    The objects of all pictures lie behind one another, those of picture i from `starts[i]` to `starts[i + 1]`.
    """

    root: str
    files: tuple[str, ...]  # relative to root
    image_ids: Int[np.ndarray, " images"]
    sizes: Int[np.ndarray, "images 2"]  # height, width
    starts: Int[np.ndarray, " images+1"]
    objects: Boxes
    endless: bool = False

    def __len__(self) -> int:
        return len(self.files)

    def paths(self) -> list[str]:
        """Of all pictures."""
        return [os.path.join(self.root, file) for file in self.files]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises UnreadableImage for a file that cannot be read, DataError if they all have gone."""
        truth = self.truth(index)
        del truth["image_id"]
        return {"image": read_file(self.root, truth["name"]), **truth}

    def truth(self, index: int) -> dict[str, Any]:
        """See `DenseSource`."""
        index = int(index)
        of_picture = slice(self.starts[index], self.starts[index + 1])
        return {
            "name": os.path.join(self.root, self.files[index]),
            "image_id": int(self.image_ids[index]),
            "size": tuple(self.sizes[index].tolist()),
            "objects": Boxes(*(values[of_picture] for values in self.objects)),
        }

    def some(self, chosen: Bool[np.ndarray, " images"]) -> "BoxFiles":
        """The chosen pictures."""
        counts = np.diff(self.starts)
        objects = np.repeat(chosen, counts)
        return dataclasses.replace(
            self,
            files=tuple(file for file, take in zip(self.files, chosen, strict=True) if take),
            image_ids=self.image_ids[chosen],
            sizes=self.sizes[chosen],
            starts=np.concatenate([[0], np.cumsum(counts[chosen])]),
            objects=Boxes(*(values[objects] for values in self.objects)),
        )

    @property
    def counts(self) -> Int[np.ndarray, " images"]:
        """How many objects each picture has, crowds left out."""
        owners = np.repeat(np.arange(len(self)), np.diff(self.starts))[~self.objects.crowd]
        return np.bincount(owners, minlength=len(self))


class Annotations:
    """What a format's reader finds, picture by picture and box by box, until it is checked and becomes a source.

    Args:
        origin: where the boxes are written, for messages; pictures may have another.
        exif: what the run does with EXIF orientations: boxes belong to the pictures as the model sees them.
    """

    def __init__(self, origin: str, root: Path, exif: Exif):
        self._origin, self._root, self._exif = origin, root, exif
        self._files: list[str] = []
        self._image_ids: list[int] = []
        self._sizes: list[tuple[int, int] | None] = []
        self._origins: list[str] = []
        self._owners: list[int] = []
        self._seen: dict[tuple[int, Exif], tuple[int, int] | None] = {}  # sizes
        self._rows: list[tuple[Sequence[float], int, bool, float | None]] = []

    def add_picture(self, file: str, *, image_id: int, size: tuple[int, int] | None, origin: str | None = None) -> int:
        """A picture, relative to the root, and what is said of its (height, width); returns its place."""
        self._files.append(file)
        self._image_ids.append(image_id)
        self._sizes.append(size)
        self._origins.append(origin or self._origin)
        return len(self._files) - 1

    def add_box(
        self, picture: int, box: Sequence[float], label: int, *, crowd: bool = False, area: float | None = None
    ) -> None:
        """A box of a picture: x1, y1, x2, y2 in its pixels; the area is that of the object, where it is known."""
        self._owners.append(picture)
        self._rows.append((box, label, crowd, area))

    def source(self) -> tuple[BoxFiles, list[str]]:
        """The pictures, and what the user should know: boxes that were cut or left out.

        Raises SettingsError for a picture that is missing or of another size than said, and for boxes that are not
        numbers, lie outside their picture, or are in another format.
        """
        self._check_files()
        sizes = self._checked_sizes()
        order = np.argsort(np.array(self._owners, np.int64), kind="stable")
        owners = np.array(self._owners, np.int64)[order]
        rows = [self._rows[place] for place in order]
        boxes = np.array([box for box, *_ in rows], np.float64).reshape(-1, 4)
        boxes, kept, notes = self._checked_boxes(boxes, owners, sizes)
        sides = boxes[:, 2:] - boxes[:, :2]
        areas = np.array([np.nan if area is None else area for *_, area in rows], np.float64)
        objects = Boxes(
            boxes.astype(np.float32)[kept],
            np.array([label for _, label, *_ in rows], np.int32)[kept],
            np.array([crowd for _, _, crowd, _ in rows], bool)[kept],
            np.where(np.isnan(areas), np.prod(sides, axis=1), areas)[kept],
        )
        starts = np.searchsorted(owners[kept], np.arange(len(self._files) + 1))
        source = BoxFiles(
            str(self._root), tuple(self._files), np.array(self._image_ids, np.int64), sizes, starts, objects
        )
        return source, notes

    # --- pictures ---

    def _path(self, picture: int) -> str:
        return os.path.join(self._root, self._files[picture])

    def _check_files(self) -> None:
        if not self._files:
            raise SettingsError(f"{self._origin} names no pictures")
        twice = [file for file, count in Counter(self._files).items() if count > 1]
        if twice:
            raise SettingsError(f"{self._origin} names pictures twice: {_few(twice)}")
        missing = [place for place in range(len(self._files)) if not os.path.isfile(self._path(place))]
        if missing:
            names = _few([self._path(place) for place in missing])
            of = f"{len(missing)} of the {len(self._files)} pictures in {self._origin}"
            raise SettingsError(f"{of} are missing: {names}")

    def _checked_sizes(self) -> Int[np.ndarray, "images 2"]:
        """What is said of the sizes, compared with some files, or else the sizes of the files."""
        count = len(self._files)
        looked_at = set(np.linspace(0, count - 1, min(count, _LOOKED_AT), dtype=int).tolist())
        sizes = []
        for place, said in enumerate(self._sizes):
            found = self.size_of(place) if said is None or place in looked_at else said
            if found is None:  # an unreadable picture is told when it is read
                found = said or _UNREADABLE
            if said is not None and found != said:
                raise self._size_error(place, said, found)
            sizes.append(found)
        return np.array(sizes, np.int64).reshape(-1, 2)

    def size_of(self, place: int, exif: Exif | None = None) -> tuple[int, int] | None:
        """Height and width of a picture as the model sees it; None where it cannot be read."""
        exif = exif or self._exif
        if (place, exif) not in self._seen:
            self._seen[place, exif] = picture_size(self._path(place), exif)
        return self._seen[place, exif]

    def _size_error(self, place: int, said: tuple[int, int], found: tuple[int, int]) -> SettingsError:
        other = "keep" if self._exif == "apply" else "apply"
        turned = "; it carries an EXIF orientation, and its boxes fit with --exif " + other
        fits = self.size_of(place, other) == said
        return SettingsError(
            f"{self._origins[place]} tells {said[1]} x {said[0]} pixels of {self._path(place)}, which has "
            f"{found[1]} x {found[0]}{turned if fits else ''}"
        )

    # --- boxes ---

    def _checked_boxes(
        self, boxes: Float[np.ndarray, "boxes 4"], owners: np.ndarray, sizes: np.ndarray
    ) -> tuple[Float[np.ndarray, "boxes 4"], Bool[np.ndarray, " boxes"], list[str]]:
        """The boxes cut to their pictures, which of them are left, and notes on the others."""

        def told(wrong: Bool[np.ndarray, " boxes"]) -> str:
            place = int(np.flatnonzero(wrong)[0])
            owner = owners[place]
            values = ", ".join(f"{value:g}" for value in boxes[place])
            height, width = sizes[owner]
            return f"{self._origins[owner]}: box ({values}) of {self._files[owner]}, {width} x {height} pixels"

        if not len(boxes):
            return boxes, np.zeros(0, bool), []
        limits = np.tile(sizes[owners][:, ::-1], 2).astype(np.float64)
        with np.errstate(invalid="ignore"):
            sides = boxes[:, 2:] - boxes[:, :2]
            unknown, turned = ~np.isfinite(boxes).all(1), (sides < 0).any(1)
            empty = (sides == 0).any(1)
            outside = ~empty & ((boxes[:, 2:] <= 0) | (boxes[:, :2] >= limits[:, 2:])).any(1)
            beyond = ((boxes < -_BEYOND) | (boxes > limits + _BEYOND)).any(1)
        rule = "boxes are x1, y1, x2, y2 here, with x1 < x2 and y1 < y2"
        if unknown.any():
            raise SettingsError(f"{told(unknown)}, is not made of finite numbers")
        if turned.any():
            raise SettingsError(f"{told(turned)}, has a negative width or height: {rule}")
        if (boxes <= 1).all() and (limits.max() > 2):
            raise SettingsError(f"{told(~unknown)}, and all others lie between 0 and 1: they are shares, not pixels")
        if outside.any():
            raise SettingsError(f"{told(outside)}, lies outside of it: {rule}")
        if beyond.mean() > _MOST_BEYOND:
            share = f"as {int(beyond.sum())} of {len(boxes)} do: in another format or for other sizes?"
            raise SettingsError(f"{told(beyond)}, reaches out of it, {share} {rule}")
        notes = []
        if empty.any():
            notes.append(f"left out, as they have no area: {int(empty.sum())} of {len(boxes)} boxes; {told(empty)}")
        if beyond.any():
            notes.append(f"cut to their picture: {int(beyond.sum())} of {len(boxes)} boxes; {told(beyond)}")
        cut = np.clip(boxes, 0, limits)
        kept = ~empty & (cut[:, 2:] > cut[:, :2]).all(1)
        return cut, kept, notes


def box_sets(
    train: BoxFiles,
    held_out: BoxFiles | None,
    class_names: Sequence[str],
    *,
    origin: str,
    held_out_split: str | None,
    category_ids: Sequence[int] | None = None,
    val_fraction: float,
    seed: int,
    notes: Sequence[str] = (),
) -> DenseSets:
    """A data set of pictures with boxes; where nothing is held out, whole pictures are drawn by `seed`: the same share
    of those with objects and of those without.

    Raises SettingsError if a side has no boxes.
    """
    notes = list(notes)
    if held_out is None:
        _check_boxes("", train, origin)
        with_objects = train.counts > 0
        if with_objects.sum() < 2:
            raise SettingsError(
                f"{origin} has one picture with boxes: it needs two, one to train on and one that is held out"
            )
        chosen = np.zeros(len(train), bool)
        chosen[with_objects] = draw_held_out(int(with_objects.sum()), fraction=val_fraction, seed=seed)
        if (~with_objects).sum() > 1:
            chosen[~with_objects] = draw_held_out(int((~with_objects).sum()), fraction=val_fraction, seed=seed)
        train, held_out = train.some(~chosen), train.some(chosen)
        held_out_split = f"{val_fraction:.0%} of the pictures"
    _check_boxes(" to train on", train, origin)
    _check_boxes(" held out", held_out, origin)
    if not class_names:
        raise SettingsError(f"{origin} names no classes")
    digest = hashlib.sha256(repr((tuple(class_names), train.files, held_out.files)).encode())
    for source in (train, held_out):
        for values in (source.starts, *source.objects[:3]):
            digest.update(np.ascontiguousarray(values).tobytes())
    unused = [name for place, name in enumerate(class_names) if not (train.objects.classes == place).any()]
    if unused:
        notes.append(f"{len(unused)} of {len(class_names)} classes have no box to train on: {_few(unused)}")
    return DenseSets(
        train,
        held_out,
        tuple(class_names),
        held_out_split or "",
        digest.hexdigest(),
        notes=tuple(notes),
        kind="detection",
        most_boxes=int(max(train.counts.max(), held_out.counts.max())),
        category_ids=tuple(range(len(class_names)) if category_ids is None else category_ids),
    )


def _check_boxes(side: str, source: BoxFiles, origin: str) -> None:
    counts = source.counts
    if not counts.any():
        crowds = ", only crowds" if len(source.objects.boxes) else ""
        raise SettingsError(f"none of the {len(source)} pictures{side} in {origin} has a box{crowds}")
    most = int(counts.argmax())
    if counts[most] > _MOST_BOXES:
        raise SettingsError(
            f"{origin}: {shown(source.files[most])} has {counts[most]:,} boxes, and each picture of a batch would get "
            f"places for as many; there can be {_MOST_BOXES:,}: cut it into several pictures"
        )


def _few(names: Sequence[str]) -> str:
    return listed(map(shown, names[:3]), len(names))
