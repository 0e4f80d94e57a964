"""Folders of pictures without classes, for pre-training."""

import os
from pathlib import Path

from convert.errors import SettingsError
from convert.image_files import IMAGE_SUFFIXES, LeftOut, image_files
from train.data.folders.classes import image_sets
from train.data.folders.layout import find_splits, visible_folders
from train.data.held_out import draw_held_out
from train.data.sources import ImageSets


def has_classes(root: Path) -> bool:
    """Whether there are class folders in a folder, or in one of its split folders; also where there is no folder."""
    if not root.is_dir():
        return True  # whoever opens it says so
    splits, _ = find_splits(root)
    return any(visible_folders(root / name) for name in splits.values() or [""])


def open_pictures(root: Path, *, val_fraction: float, seed: int) -> ImageSets:
    """A folder of pictures, or of split folders such as `train/` and `val/` with nothing but pictures in them.

    Without a folder for it, the share `val_fraction` of the pictures is held out, chosen by `seed`. There are no class
    names, and each label is 0.

    Raises SettingsError if there are too few pictures, or split folders without one to train on.
    """
    splits, _ = find_splits(root)
    if splits and "train" not in splits:
        raise SettingsError(f"{root} has {' and '.join(f'{name}/' for name in splits.values())} and no train/")
    train_root, left_out = root / splits.get("train", ""), LeftOut()
    train = _pictures(train_root, left_out)
    held_split = splits.get("val", splits.get("test"))
    if held_split is not None:
        held_root, held_out = root / held_split, _pictures(root / held_split, left_out)
    elif len(train) < 2:
        raise SettingsError(f"{train_root} has one picture: one is trained on, and another one held out")
    else:
        chosen = draw_held_out(len(train), fraction=val_fraction, seed=seed)
        held_root, held_out = train_root, [file for file, held in zip(train, chosen, strict=True) if held]
        train = [file for file, held in zip(train, chosen, strict=True) if not held]
    split = held_split or f"{val_fraction:.0%} of the pictures"
    return image_sets(train_root, {"": train}, held_root, {"": held_out}, split, left_out.notes(), class_names=())


def _pictures(folder: Path, left_out: LeftOut) -> list[str]:
    """Relative to the folder. Raises SettingsError if there are none."""
    start = len(os.path.join(str(folder), ""))
    found = [path[start:] for path in image_files(folder, left_out=left_out)]
    if not found:
        raise SettingsError(f"no images in {folder} (looked for {' '.join(IMAGE_SUFFIXES)})")
    return found
