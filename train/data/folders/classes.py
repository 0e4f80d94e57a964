"""Folders of class folders as sources of image files."""

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from convert.errors import SettingsError, listed
from convert.image_files import IMAGE_SUFFIXES, LeftOut
from train.data.folders.layout import Images, class_folders, find_splits, layout_notes, list_images, visible_folders
from train.data.folders.shared import shared_images, shared_note
from train.data.held_out import draw_of_each_class
from train.data.sources import ImageSets, read_file


@dataclass(frozen=True)
class FolderSource:
    """Image files with their labels."""

    root: str
    files: tuple[str, ...]  # relative to root, or whole paths
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.files)

    def paths(self) -> list[str]:
        """Of all files."""
        start = os.path.join(self.root, "")
        return [file if file.startswith(os.sep) else start + file for file in self.files]

    @cached_property
    def _above(self) -> str:
        """A folder that all files lie in, which is looked for when one of them is not there."""
        whole = [file for file in self.files if file.startswith(os.sep)]
        return os.path.commonpath(whole) if len(whole) == len(self.files) > 1 else self.root

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises UnreadableImage for a file that cannot be read, DataError if they all have gone."""
        index = int(index)
        path = os.path.join(self.root, self.files[index])
        return {"image": read_file(self._above, path), "label": int(self.labels[index]), "name": path}


def open_folder(root: Path, *, val_fraction: float, seed: int) -> ImageSets:
    """A folder with a folder of class folders for each split, such as `train/` and `val/`, or of class folders itself.

    Split folders are known in any case and many spellings, see `train.data.folders.layout`. Held out is `val/`, or
    `test/` where there is none; it may lack classes. Class folders alone are split: of each class the share
    `val_fraction` is held out, at least one image, chosen by `seed`. Classes are the folders' names sorted as text.
    Images may lie deeper inside a class folder.

    Raises SettingsError if there is no such folder, no class, nothing to train on or to hold out, a class that has only
    held-out images, or none at all.
    """
    splits, others = _splits_of(root)
    left_out = LeftOut()
    if not splits:
        images = _with_images(root, list_images(root, left_out))
        train, held_out = split_images(root, images, val_fraction=val_fraction, seed=seed)
        notes = [*layout_notes(root, images), *left_out.notes()]
        return image_sets(root, train, root, held_out, f"{val_fraction:.0%} of each class", notes)
    train_split, held_out_split = splits.get("train"), splits.get("val", splits.get("test"))
    if train_split is None:
        there = " and ".join(f"{name}/" for name in splits.values())
        raise SettingsError(
            f"{root} has {there} and no train/: it can only be evaluated, by --split {' or '.join(splits)} of "
            "train.evaluate"
        )
    if held_out_split is None:
        raise SettingsError(f"{root} has a folder {train_split}/ but none of validation/, val/, test/")
    train_root, held_out_root = root / train_split, root / held_out_split
    train = _with_images(train_root, list_images(train_root, left_out, beside=(held_out_root,)))
    held_out = list_images(held_out_root, left_out, beside=(train_root,))
    held_out, notes = in_classes(held_out_root, held_out, tuple(train), train_split)
    notes += [*layout_notes(train_root, train), *layout_notes(held_out_root, held_out), *left_out.notes()]
    if others:
        notes.append(f"beside {train_split}/ and {held_out_split}/, these folders are left out: {listed(others)}")
    if "val" not in splits:
        notes.append(f"there is no val/ in {root}: in training, {held_out_split}/ chooses the best checkpoint")
    return image_sets(train_root, train, held_out_root, held_out, held_out_split, notes)


def open_split(root: Path, split: str) -> tuple[FolderSource, tuple[str, ...], list[str]]:
    """The images of one split folder, `train`, `val` or `test`; of a folder that has none: `all`.

    The classes are those of the folder for training, where there is one.

    Returns:
        The images, the names of the classes in the order of the labels, and what the user should know.

    Raises SettingsError if there is no such folder or split, no images, or classes that training does not have.
    """
    splits, _ = _splits_of(root)
    if split not in (splits or ("all",)):
        there = " or ".join(("held-out", "train", "all")) if not splits else " or ".join(splits)
        raise SettingsError(f"{root} has no split {split}: choose --split {there}")
    folder, left_out = root / splits.get(split, ""), LeftOut()
    images = list_images(folder, left_out)
    if "train" in splits:
        classes = class_folders(root / splits["train"], LeftOut())
        images, notes = in_classes(folder, images, tuple(classes), splits["train"])
    else:
        images, notes = _with_images(folder, images), []
    notes += [*layout_notes(folder, images), *left_out.notes()]
    return image_source(folder, images), tuple(images), notes


def one_class_error(root: Path, name: str) -> SettingsError:
    """The error for a folder that has one class, which nothing can be learned from."""
    splits, _ = _splits_of(root)
    inside = visible_folders(root / splits.get("train", "") / name)
    deeper = f"; did you mean folder:{root / name}?" if inside and not splits else ""
    holds = f", a folder that holds the folders {listed(inside)}" if inside else ""
    return SettingsError(f"{root} has one class, {name}{holds}: training needs two or more{deeper}")


def _splits_of(root: Path) -> tuple[dict[str, str], list[str]]:
    if not root.is_dir():
        raise SettingsError(f"there is no folder {root}")
    return find_splits(root)


def _with_images(root: Path, images: Images) -> Images:
    """The images of a folder. Raises SettingsError if a class has none."""
    empty = [name for name, files in images.items() if not files]
    looked_for = f"(looked for {' '.join(IMAGE_SUFFIXES)})"
    if len(empty) == len(images):
        raise SettingsError(f"no images in any of the {len(images)} class folders of {root} {looked_for}")
    if empty:
        raise SettingsError(f"no images in {listed(str(root / name) for name in empty)} {looked_for}")
    return images


def in_classes(root: Path, images: Images, classes: tuple[str, ...], train: str) -> tuple[Images, list[str]]:
    """The images of a split folder under the classes of that for training. A note tells which of them have none.

    Args:
        train: the name of the folder for training.

    Raises SettingsError if there are images of other classes, or none.
    """
    unknown = [name for name, files in images.items() if files and name not in set(classes)]
    if unknown:
        where = f"{root.parent} has classes in {root.name}/ that are missing in {train}/"
        raise SettingsError(f"{where}: {listed(unknown)}")
    images = {name: images.get(name, []) for name in classes}
    lacking = [name for name, files in images.items() if not files]
    if len(lacking) == len(images):
        _with_images(root, images)
    told = f"{root} has no images of {len(lacking)} of the {len(images)} classes: {listed(lacking)}"
    return images, [told] if lacking else []


def split_images(root: Path, images: Images, *, val_fraction: float, seed: int) -> tuple[Images, Images]:
    """The images to train on and those held out. Raises SettingsError if a class has a single image."""
    single = [name for name, files in images.items() if len(files) < 2]
    if single:
        raise SettingsError(f"{root} cannot be split: a class needs two images or more, unlike {listed(single)}")
    labels = np.repeat(np.arange(len(images)), [len(files) for files in images.values()])
    held = draw_of_each_class(labels, fraction=val_fraction, seed=seed)
    sides: tuple[Images, Images] = ({}, {})
    for label, (name, files) in enumerate(images.items()):
        for side, of_side in zip(sides, (~held, held), strict=True):
            side[name] = [file for file, taken in zip(files, of_side[labels == label], strict=True) if taken]
    return sides


def image_sets(
    train_root: Path,
    train: Images,
    held_out_root: Path,
    held_out: Images,
    split: str,
    notes: list[str],
    class_names: tuple[str, ...] | None = None,
) -> ImageSets:
    """The data set of image files by class.

    Args:
        split: what is held out, in words.
        class_names: none of them, where the images have no classes; None: those of `train`.
    """
    sources = image_source(train_root, train), image_source(held_out_root, held_out)
    shared = shared_images(*(source.paths() for source in sources))
    return ImageSets(
        *sources,
        tuple(train) if class_names is None else class_names,
        split,
        _fingerprint(train, {name: files for name, files in held_out.items() if files}),
        notes=(*notes, *shared_note(shared, len(sources[1]))),
        sorted_by_name=True,
    )


def image_source(root: Path, images: Images) -> FolderSource:
    """Image files by class as a source."""
    labels = np.repeat(np.arange(len(images)), [len(files) for files in images.values()])
    return FolderSource(str(root), tuple(file for files in images.values() for file in files), labels)


def _fingerprint(train: Images, held_out: Images) -> str:
    """Of the names of all classes and files; which class and side a file belongs to is part of it."""
    return hashlib.sha256(json.dumps([list(train.items()), list(held_out.items())]).encode()).hexdigest()
