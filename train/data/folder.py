"""Folders of class folders as sources of image files."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert.errors import SettingsError, listed
from convert.files import IMAGE_SUFFIXES, image_files
from crossvit_jax.preprocess import UnreadableImage
from train.data.sources import HELD_OUT_SPLITS, TRAIN_SPLIT, DataError, ImageSets

Images = dict[str, list[str]]  # image files by class


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
    if not (root / TRAIN_SPLIT).is_dir():
        train, held_out = _split(root, list_images(root), val_fraction=val_fraction, seed=seed)
        return _image_sets(root, train, root, held_out, f"{val_fraction:.0%} of each class")
    held_out_split = next((split for split in HELD_OUT_SPLITS if (root / split).is_dir()), None)
    if held_out_split is None:
        raise SettingsError(f"{root} has a folder train/ but none of {', '.join(s + '/' for s in HELD_OUT_SPLITS)}")
    train, held_out = list_images(root / TRAIN_SPLIT), list_images(root / held_out_split)
    for here, files, there, other in (
        (TRAIN_SPLIT, train, held_out_split, held_out),
        (held_out_split, held_out, TRAIN_SPLIT, train),
    ):
        missing = sorted(set(other) - set(files))
        if missing:
            raise SettingsError(f"{root} has classes in {there}/ that are missing in {here}/: {listed(missing)}")
    return _image_sets(root / TRAIN_SPLIT, train, root / held_out_split, held_out, held_out_split)


def list_images(root: Path) -> Images:
    """Class names in alphabetical order, and each one's image files relative to `root`, sorted.

    Raises SettingsError if there is no class folder, or one without images.
    """
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise SettingsError(f"{root} has no class folders: it should hold one folder of images per class")
    images = {name: sorted(os.path.relpath(file, root) for file in image_files(root / name)) for name in classes}
    empty = [name for name, files in images.items() if not files]
    looked_for = f"(looked for {' '.join(IMAGE_SUFFIXES)})"
    if len(empty) == len(images):
        raise SettingsError(f"no images in any of the {len(images)} class folders of {root} {looked_for}")
    if empty:
        raise SettingsError(f"no images in {listed(str(root / name) for name in empty)} {looked_for}")
    return images


def _split(root: Path, images: Images, *, val_fraction: float, seed: int) -> tuple[Images, Images]:
    """The images to train on and those held out."""
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
    return train, held_out


def _image_sets(train_root: Path, train: Images, held_out_root: Path, held_out: Images, split: str) -> ImageSets:
    sources = folder_source(train_root, train), folder_source(held_out_root, held_out)
    return ImageSets(*sources, tuple(train), split, _fingerprint(train, held_out))


def folder_source(root: Path, images: Images) -> FolderSource:
    """The images that `list_images` found in a folder, class by class."""
    labels = np.repeat(np.arange(len(images)), [len(files) for files in images.values()])
    return FolderSource(str(root), tuple(file for files in images.values() for file in files), labels)


def _fingerprint(train: Images, held_out: Images) -> str:
    """Of the names of all classes and files; which class and side a file belongs to is part of it."""
    return hashlib.sha256(json.dumps([list(train.items()), list(held_out.items())]).encode()).hexdigest()
