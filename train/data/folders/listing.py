"""Lists of image files in CSV: a line for each, with its class."""

import csv
import io
import os
from collections.abc import Iterator
from pathlib import Path

from convert.errors import SettingsError
from convert.files import shown
from crossvit_jax.files import read_regular
from train.data.folders.classes import FolderSource, image_sets, image_source, in_classes, split_images
from train.data.folders.layout import SPLITS, Images, split_of
from train.data.sources import ImageSets

# the names that a column may have, in any case
_COLUMNS = {
    "path": ("path", "image", "file", "filename", "file_name", "image_path", "filepath"),
    "label": ("label", "class", "class_name", "target"),
    "split": ("split", "set", "subset"),
}
_LONGEST = 2**30  # bytes
_LOOKED_AT = 100  # files, for whether paths lead anywhere

Listing = dict[str | None, Images]  # image files by class, of each split; None: the list tells no splits


def open_listing(file: Path, *, val_fraction: float, seed: int) -> ImageSets:
    """The image files that a CSV file lists. Its first line names the columns: path, label and, if it likes, split.

    Paths are relative to the folder of the list, or whole. Labels are names of classes, which are sorted as text.
    Splits are known in many spellings, see `train.data.folders.layout`: `val` is held out, or `test` where there is
    none. Without them, of each class the share `val_fraction` is held out, chosen by `seed`.

    Raises SettingsError, naming file and line, for what cannot be read as such a list, has nothing to train on or to
    hold out, or leads to no files.
    """
    listing, root = read_listing(file), file.absolute().parent
    if None in listing:
        train, held_out = split_images(file, listing[None], val_fraction=val_fraction, seed=seed)
        return image_sets(root, train, root, held_out, f"{val_fraction:.0%} of each class", [])
    split = "val" if "val" in listing else "test"
    if "train" not in listing or split not in listing:
        raise SettingsError(
            f"{file} lists images of {' and '.join(map(str, listing))}: training needs train, and val or test"
        )
    train = listing["train"]
    held_out, notes = in_classes(file / split, listing[split], tuple(train), "train")
    if split == "test":
        notes.append(f"there is no val in {file}: in training, test chooses the best checkpoint")
    return image_sets(root, train, root, held_out, split, notes)


def open_listed_split(file: Path, split: str) -> tuple[FolderSource, tuple[str, ...], list[str]]:
    """The images of one split of a CSV file, `train`, `val` or `test`; of one that tells none: `all`.

    Returns:
        The images, the names of the classes in the order of the labels, and what the user should know.

    Raises SettingsError as `open_listing` does, or where there is no such split.
    """
    listing, root = read_listing(file), file.absolute().parent
    if (None if split == "all" else split) not in listing:
        there = " or ".join(("held-out", "train", "all") if None in listing else map(str, listing))
        raise SettingsError(f"{file} has no split {split}: choose --split {there}")
    images, notes = listing[None if split == "all" else split], []
    if "train" in listing:
        images, notes = in_classes(file / split, images, tuple(listing["train"]), "train")
    return image_source(root, images), tuple(images), notes


def read_listing(file: Path) -> Listing:
    """The files that a CSV file lists, by split and class; classes and files are sorted as text.

    Raises SettingsError, naming file and line, if it is no such list, names a file twice or lists none that exists.
    """
    rows = _rows(file)
    header = [cell.strip().lower() for cell in next(rows)[1]]
    places = {what: [header.index(name) for name in names if name in header] for what, names in _COLUMNS.items()}
    for what in ("path", "label"):
        if len(places[what]) != 1:
            found = "has more than one" if places[what] else f"({', '.join(map(shown, header))}) has no"
            raise SettingsError(f"the first line of {file} {found} column {' or '.join(_COLUMNS[what])}")
    path_at, label_at, split_at = (found[0] if found else None for found in places.values())
    splits: dict[str | None, dict[str, list[str]]] = {}
    lines: dict[str, int] = {}
    for line, row in rows:
        if len(row) != len(header):
            raise SettingsError(f"line {line} of {file} has {len(row)} columns, and the first line has {len(header)}")
        path, label = row[path_at].strip(), row[label_at].strip()
        if not path or not label or "\0" in path:
            raise SettingsError(f"line {line} of {file} has no {'label' if path and not label else 'path'}")
        if path in lines:
            raise SettingsError(f"{file} names {shown(path)} twice, in lines {lines[path]} and {line}")
        lines[path] = line
        split = None if split_at is None else split_of(row[split_at].strip())
        if split_at is not None and split is None:
            known = ", ".join(SPLITS)
            raise SettingsError(f"line {line} of {file} has the split {shown(row[split_at])!r}; known are {known}")
        splits.setdefault(split, {}).setdefault(label, []).append(path)
    if not lines:
        raise SettingsError(f"{file} lists no images")
    _check_some_exist(file, list(lines))
    return {
        split: {name: sorted(files) for name, files in sorted(splits[split].items())}
        for split in (*SPLITS, None)
        if split in splits
    }


def _rows(file: Path) -> Iterator[tuple[int, list[str]]]:
    """The lines of a CSV file that are not empty, with their numbers. Raises SettingsError."""
    try:
        text = read_regular(file, at_most=_LONGEST).decode("utf-8-sig")
    except OSError as error:
        raise SettingsError(f"cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{file} is no CSV file: it is not UTF-8 text") from None
    first = text.partition("\n")[0]
    separator = max(",;\t", key=first.count)  # spreadsheets of some languages write semicolons
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    try:
        rows = [(reader.line_num, row) for row in reader if any(row)]
    except csv.Error as error:
        raise SettingsError(f"line {reader.line_num} of {file} is no CSV: {error}") from None
    if not rows:
        raise SettingsError(f"{file} is empty: its first line names the columns path and label")
    return iter(rows)


def _check_some_exist(file: Path, paths: list[str]) -> None:
    """Raises SettingsError if none of the first files is there; single ones that cannot be read are told in a run."""
    root = file.absolute().parent
    some = paths[:_LOOKED_AT]
    if not any(os.path.exists(os.path.join(root, path)) for path in some):
        raise SettingsError(
            f"none of the first {len(some)} files of {file} is there, such as "
            f"{shown(os.path.join(root, some[0]))}: paths are relative to the folder of the list, or whole"
        )
