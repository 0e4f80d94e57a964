"""Pictures with masks: PNG files whose values, palette indices or colours tell the class of each pixel."""

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from convert.errors import SettingsError, listed, one_line
from convert.files import shown
from convert.image_files import image_files
from crossvit_jax.preprocess import Exif, UnreadableImage, open_image
from train.data.dense.annotation_files import read_lines
from train.data.dense.samples import DenseSets, picture_size
from train.data.folders.layout import find_splits
from train.data.held_out import draw_held_out
from train.data.sources import read_file
from train.devices.decoding import decoding_memory
from train.images.geometry import IGNORED

CLASSES_FILE = "classes.txt"
_LOOKED_AT = 200  # masks that are read before a run
_TAKEN = 24  # bytes of a pixel: what the picture takes too, which is decoded next
_AT_ONCE = 2**20  # pixels of a mask of which classes are found: each takes some 40 bytes then
UNKNOWN = 254  # in the table of classes: a value of no class
_MOST_CLASSES = 254
_IMAGES, _MASKS = ("images", "image", "img", "imgs"), ("masks", "mask", "labels", "annotations")
_COLOUR = re.compile(r"(.+?)[\s,]+(\d{1,3})[\s,]+(\d{1,3})[\s,]+(\d{1,3})")


@dataclass(frozen=True, eq=False)
class MaskFiles:
    """Pictures in files, each with a mask; see `train.data.dense.samples.DenseSource`."""

    root: str
    files: tuple[str, ...]  # relative to root
    masks: tuple[str, ...]
    classes: Int[np.ndarray, " values"]  # by the value of a pixel, or the place of its colour: class, IGNORED, UNKNOWN
    colours: UInt8[np.ndarray, "colours 3"] | None  # None: masks hold values
    endless: bool = False

    def __len__(self) -> int:
        return len(self.files)

    def paths(self) -> list[str]:
        """Of all pictures."""
        return [os.path.join(self.root, file) for file in self.files]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises UnreadableImage for a picture or a mask that cannot be used, DataError if they all have gone."""
        truth = self.truth(index)
        del truth["image_id"]
        return {"image": read_file(self.root, truth["name"]), **truth}

    def truth(self, index: int) -> dict[str, Any]:
        """See `DenseSource`."""
        name, path = (os.path.join(self.root, files[index]) for files in (self.files, self.masks))
        segments = read_mask(read_file(self.root, path), path, self.classes, self.colours)
        return {"name": name, "image_id": int(index), "segments": segments}


def read_mask(
    encoded: bytes,
    name: str,
    classes: Int[np.ndarray, " values"],
    colours: UInt8[np.ndarray, "colours 3"] | None = None,
) -> UInt8[np.ndarray, "height width"]:
    """The classes of a mask's pixels.

    Args:
        classes, colours: see `MaskFiles`.

    Raises UnreadableImage if it cannot be decoded, or has a value or colour that is in neither.
    """
    try:
        with decoding_memory().returned(), open_image(encoded) as mask:
            decoding_memory().take(mask.width * mask.height, _TAKEN)
            if mask.format in ("JPEG", "MPO"):
                raise ValueError("it is a JPEG file, which does not keep the values of pixels: masks are PNG files")
            mask.load()
            stored = _stored(mask, colours)
        segments = np.empty(stored.shape[:2], np.uint8)
        rows = max(1, _AT_ONCE // stored.shape[1])
        for top in range(0, len(stored), rows):
            values = _values(stored[top : top + rows], colours, top)
            segments[top : top + rows] = _classes_of(values, classes, top)
    except MemoryError:
        raise
    except Exception as error:  # whatever Pillow's parsers raise
        raise UnreadableImage(name, one_line(error)) from error
    return segments


def _stored(mask: Image.Image, colours: UInt8[np.ndarray, "colours 3"] | None) -> Int[np.ndarray, "height width ..."]:
    """The values or, where there are `colours`, the colours of a mask's pixels."""
    if colours is not None:
        return np.asarray(mask.convert("RGB"))
    if mask.mode not in ("P", "L", "1", "I", "I;16", "I;16B"):
        raise ValueError(
            f"it is in colours ({mask.mode}), and {CLASSES_FILE} tells no colours: a line each, as `road 128 64 128`"
        )
    values = np.asarray(mask)
    return values.astype(np.uint8) if values.dtype == bool else values


def _classes_of(
    values: Int[np.ndarray, "rows width"], classes: Int[np.ndarray, " values"], top: int
) -> UInt8[np.ndarray, "rows width"]:
    """The classes of rows of a mask that begin at `top`. Raises ValueError for a value of none."""
    wrong = (values < 0) | (values >= len(classes))
    found = classes[np.where(wrong, 0, values)]
    wrong |= found == UNKNOWN
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        known = int((classes < UNKNOWN).sum())
        raise ValueError(
            f"it has {values[row, column]} at x {column}, y {top + row}, which is none of the {known} classes"
        )
    return found


def _values(
    stored: Int[np.ndarray, "rows width ..."], colours: UInt8[np.ndarray, "colours 3"] | None, top: int
) -> Int[np.ndarray, "rows width"]:
    """What the table of classes is asked for, of rows of a mask that begin at `top`."""
    if colours is None:
        return stored
    keys = _keys(stored)
    known = _keys(colours)
    order = np.argsort(known)
    places = np.minimum(np.searchsorted(known[order], keys), len(known) - 1)
    found = order[places]
    wrong = known[found] != keys
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        colour = tuple((int(keys[row, column]) >> shift) & 255 for shift in (16, 8, 0))
        raise ValueError(f"it has the colour {colour} at x {column}, y {top + row}, which is none of {CLASSES_FILE}")
    return found


def _keys(colours: UInt8[np.ndarray, "*pixels 3"]) -> Int[np.ndarray, "*pixels"]:
    return colours.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])


def open_masks(path: Path, *, ignore_index: int, val_fraction: float, seed: int, exif: Exif) -> DenseSets:
    """A folder with `images/` and `masks/`, each with `train/` and `val/` or without; or with these two in `train/` and
    `val/`. A mask has the name of its picture, with a suffix of its own. `classes.txt` names the classes, one a line.

    Masks hold values or palette indices. The names stand for the values from 0 on, `ignore_index` left out: what has
    that counts nowhere, nor has 255. Where every line of `classes.txt` ends with a colour (`road 128 64 128`), masks
    are in these colours; a class `ignore` or `void` then counts nowhere.

    Raises SettingsError, naming file and value, for whatever does not fit together.
    """
    if not path.is_dir():
        raise SettingsError(f"there is no folder {path}")
    names, table, colours = _read_classes(path / CLASSES_FILE, ignore_index)
    sides, split = _sides(path)
    notes: list[str] = []
    sources = []
    for images, masks in sides:
        files, masked, found = _pairs(path, images, masks)
        sources.append((files, masked))
        notes += found
    if len(sources) == 1:
        ((files, masked),) = sources
        if len(files) < 2:
            raise SettingsError(f"{path} has one picture: some are trained on, and others held out")
        held_out = draw_held_out(len(files), fraction=val_fraction, seed=seed)
        split = f"{val_fraction:.0%} of the pictures"
        sources = [
            tuple([name for name, out in zip(some, held_out, strict=True) if out == side] for some in (files, masked))
            for side in (False, True)
        ]
    train, held = (MaskFiles(str(path), tuple(files), tuple(masked), table, colours) for files, masked in sources)
    for source in (train, held):
        seen = _look_at(source, exif)
        if source is train and len(seen) < 2:
            only = f"only the class {names[seen.pop()]}" if seen else "no class"
            binary = "" if colours is not None else "; where 255 stands for a class, name it by its colour, 255 255 255"
            raise SettingsError(f"the masks of {path} to train on show {only} beside what is ignored{binary}")
    about = (names, train.files, train.masks, held.files, held.masks, table.tolist(), colours is not None)
    return DenseSets(
        train,
        held,
        names,
        split or "",
        hashlib.sha256(repr(about).encode()).hexdigest(),
        notes=tuple(notes),
        kind="segmentation",
        category_ids=tuple(range(len(names))),
    )


def _read_classes(file: Path, ignore_index: int) -> tuple[tuple[str, ...], np.ndarray, np.ndarray | None]:
    """The names, the table of classes by value, and the colours where the file has them."""
    if not os.path.lexists(file):
        raise SettingsError(f"{file} is needed, with the name of a class a line, in the order of the masks' values")
    lines = read_lines(file)
    while lines and not lines[-1]:
        lines.pop()
    if not lines or "" in lines:
        where = f"line {lines.index('') + 1} of {file} is empty" if lines else f"{file} is empty"
        raise SettingsError(f"{where}: it should have one class a line")
    matches = [_COLOUR.fullmatch(line) for line in lines]
    coloured = all(matches)
    names = [match[1] for match in matches] if coloured else lines
    if len(set(names)) < len(names):
        raise SettingsError(f"{file} has the same name for two classes")
    if coloured:
        colours = np.array([[int(match[group]) for group in (2, 3, 4)] for match in matches])
        if colours.max() > 255 or len(np.unique(colours, axis=0)) < len(colours):
            raise SettingsError(f"{file}: colours must be different, and of three numbers from 0 to 255")
        counted = [name.lower() not in ("ignore", "void") for name in names]
        table = np.where(counted, np.cumsum(counted) - 1, IGNORED).astype(np.uint8)
        names = [name for name, counts in zip(names, counted, strict=True) if counts]
        return _checked(file, names), table, colours.astype(np.uint8)
    _checked(file, names)
    table = np.full(max(256, ignore_index + 1), UNKNOWN, np.uint8)
    values = [value for value in range(len(names) + 1) if value != ignore_index][: len(names)]
    table[values] = np.arange(len(names))
    table[ignore_index] = IGNORED
    if table[255] == UNKNOWN:
        table[255] = IGNORED
    return tuple(names), table, None


def _checked(file: Path, names: Sequence[str]) -> tuple[str, ...]:
    if not 2 <= len(names) < _MOST_CLASSES:
        raise SettingsError(f"{file} has {len(names)} classes: masks need 2 to {_MOST_CLASSES - 1}")
    return tuple(names)


def _sides(root: Path) -> tuple[list[tuple[Path, Path]], str | None]:
    """The folders of pictures and masks for training and, if there are some, of what is held out."""
    splits, _ = find_splits(root)
    if "train" in splits:
        place = {
            split: tuple(_named(root / name, kind) for kind in (_IMAGES, _MASKS)) for split, name in splits.items()
        }
    else:
        images, masks = (_named(root, kind) for kind in (_IMAGES, _MASKS))
        image_splits, mask_splits = find_splits(images)[0], find_splits(masks)[0]
        if "train" not in image_splits:
            return [(images, masks)], None
        missing = [split for split in image_splits if split not in mask_splits]
        if missing:
            raise SettingsError(f"{images} has a folder {image_splits[missing[0]]}/, and {masks} has none for it")
        place = {split: (images / name, masks / mask_splits[split]) for split, name in image_splits.items()}
    held_out = next((split for split in ("val", "test") if split in place), None)
    return [place["train"], *([place[held_out]] if held_out else [])], held_out


def _named(root: Path, names: Sequence[str]) -> Path:
    found = next((root / name for name in names if (root / name).is_dir()), None)
    if found is None:
        raise SettingsError(f"{root} has no folder {names[0]}/")
    return found


def _pairs(root: Path, images: Path, masks: Path) -> tuple[list[str], list[str], list[str]]:
    """Pictures and their masks, relative to the root, and notes."""
    by_stem: dict[str, str] = {}
    for path in image_files(masks):
        stem = os.path.splitext(os.path.relpath(path, masks))[0]
        if stem in by_stem:
            raise SettingsError(f"there are two masks for one picture: {by_stem[stem]} and {path}")
        by_stem[stem] = path
    found = image_files(images)
    stems = [os.path.splitext(os.path.relpath(path, images))[0] for path in found]
    missing = [path for path, stem in zip(found, stems, strict=True) if stem not in by_stem]
    if not found:
        raise SettingsError(f"there are no pictures in {images}")
    if missing:
        count = f"{len(missing)} of the {len(found)} pictures in {images}"
        raise SettingsError(
            f"{count} have no mask of their name in {masks}: {listed(map(shown, missing[:3]), len(missing))}"
        )
    spare = len(by_stem) - len(set(stems))
    notes = [f"{spare} masks in {masks} are left out: there is no picture of their name"] if spare else []
    relative = [[os.path.relpath(path, root) for path in paths] for paths in (found, [by_stem[stem] for stem in stems])]
    return relative[0], relative[1], notes


def _look_at(source: MaskFiles, exif: Exif) -> set[int]:
    """The classes in all masks of a small data set, or in some of a larger one. Raises SettingsError for a mask that
    cannot be used."""
    seen: set[int] = set()
    for index in np.linspace(0, len(source) - 1, min(len(source), _LOOKED_AT), dtype=int).tolist():
        path = os.path.join(source.root, source.masks[index])
        try:
            segments = source.truth(index)["segments"]
        except UnreadableImage as error:
            raise SettingsError(f"mask {path} cannot be used: {error.reason}") from None
        seen.update(np.unique(segments).tolist())
        picture = os.path.join(source.root, source.files[index])
        size = picture_size(picture, exif)
        if size not in (None, segments.shape):  # None is told when the picture is read
            (rows, columns), (height, width) = segments.shape, size
            other = "keep" if exif == "apply" else "apply"
            fits = picture_size(picture, other) == segments.shape
            turned = f"; that carries an EXIF orientation, and the mask fits with --exif {other}" if fits else ""
            raise SettingsError(
                f"mask {path} has {columns} x {rows} pixels, and its picture {width} x {height}{turned}"
            )
    return seen - {IGNORED}
