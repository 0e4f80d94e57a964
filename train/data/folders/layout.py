"""What a folder of images is: one with a folder for each split, or one of class folders."""

import os
import re
from collections import Counter, defaultdict
from pathlib import Path

from convert.errors import SettingsError, listed
from convert.files import shown
from convert.image_files import LeftOut, image_files, is_hidden, is_image, is_within

Images = dict[str, list[str]]  # image files, relative to the folder that holds the class folders, by class
SPLITS = {
    "train": r"train(ing)?|trn",
    "val": r"val(id(at(e|ion))?)?|dev|eval(uat(e|ion))?",
    "test": r"test(s|ing)?|tst",
}
_MORE = r"([ _.-]?(set|data|images?|imgs?|split))?"  # as in `train_set`
_AROUND = {split: rf"(?P<before>.*[^a-z])?({names}){_MORE}(?P<after>[^a-z].*)?" for split, names in SPLITS.items()}


def split_of(name: str) -> str | None:
    """The split that a folder is named after, in any case and of many spellings: train, val or test."""
    return next((split for split, names in SPLITS.items() if re.fullmatch(f"({names}){_MORE}", name.lower())), None)


def find_splits(root: Path) -> tuple[dict[str, str], list[str]]:
    """The names of the split folders in a folder, by split, and of those beside them; no splits: the classes are here.

    A single folder is none if it holds images and no folders, and stands beside others: `train` is a kind of vehicle.
    Names may have more around them where two splits have the same, as `seg_train` and `seg_test` or `train2017` and
    `val2017`, and hold folders only.

    Raises SettingsError if there are two folders for a split.
    """
    names = visible_folders(root)
    named = {name: split for name in names if (split := split_of(name)) is not None}
    if len(named) == 1 and len(names) > 1 and _contents(root / next(iter(named))) == (True, False):
        named = {}
    named = named or _with_affixes(root, names)
    for split, count in Counter(named.values()).items():
        if count > 1:
            twice = ", ".join(f"{name}/" for name in named if named[name] == split)
            raise SettingsError(f"{root} has more than one folder for {split}: {twice}; leave one there")
    by_split = {split: name for name, split in named.items()}
    others = [name for name in names if named and name not in named]
    return {split: by_split[split] for split in SPLITS if split in by_split}, others


def visible_folders(root: Path) -> list[str]:
    """The names of the folders in a folder, hidden ones left out, sorted as text."""
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if not is_hidden(entry.name) and _is_folder(entry))


def class_folders(root: Path, left_out: LeftOut) -> list[str]:
    """The names of the class folders in a folder, sorted as text.

    A link is none if it leads to the folder itself, above it, or into a class folder beside it.

    Args:
        left_out: is told such links.

    Raises SettingsError if there is no class folder.
    """
    here, classes = os.path.realpath(root), {}
    for is_link, name in sorted((os.path.islink(root / name), name) for name in visible_folders(root)):
        real = os.path.realpath(root / name)
        if is_link and (is_within(here, real) or any(is_within(real, other) for other in classes.values())):
            left_out.links.append(str(root / name))
        else:
            classes[name] = real
    if not classes:
        raise SettingsError(f"{root} has no class folders: it should hold one folder of images per class")
    return sorted(classes)


def list_images(root: Path, left_out: LeftOut, *, beside: tuple[Path, ...] = ()) -> Images:
    """Class names sorted as text, and each one's image files relative to `root`, sorted as text; some may have none.

    Args:
        left_out: is told what is passed over.
        beside: other folders of class folders, whose images are not taken by way of links.

    Raises SettingsError as `class_folders` does.
    """
    classes = class_folders(root, left_out)
    apart = {os.path.realpath(root / name) for name in classes}
    apart |= {os.path.realpath(other / name) for other in beside for name in visible_folders(other)}
    images = {}
    for name in classes:
        start = len(str(root / name))
        found = image_files(root / name, apart=apart, left_out=left_out)
        images[name] = sorted(name + path[start:] for path in found)
    return images


def layout_notes(root: Path, images: Images) -> list[str]:
    """What the user should know of the class folders in a folder: images beside them, and those of folders only."""
    notes = []
    with os.scandir(root) as entries:
        loose = sum(is_image(entry.name) and not is_hidden(entry.name) and not _is_folder(entry) for entry in entries)
    if loose:
        notes.append(f"{loose} image file{'s' * (loose > 1)} in {root} itself, beside the class folders: left out")
    only_folders = {
        name: sorted({file.split(os.sep)[1] for file in files})
        for name, files in images.items()
        if files and all(file.count(os.sep) > 1 for file in files)
    }
    if only_folders:
        told = (f"{shown(name)} ({_few(inside)})" for name, inside in only_folders.items())
        notes.append(
            f"{len(only_folders)} of {len(images)} class folders hold only folders, and are one class each with all "
            f"that is in them: {listed(list(told)[:3], len(only_folders))}"
        )
    return notes


def _with_affixes(root: Path, names: list[str]) -> dict[str, str]:
    """The split of each folder that is named after one with the same text around it as that of another split."""
    alike: dict[tuple, dict[str, str]] = defaultdict(dict)
    for split, pattern in _AROUND.items():
        for name in names:
            if (found := re.fullmatch(pattern, name.lower())) and _contents(root / name) == (False, True):
                alike[found["before"], found["after"]][name] = split
    groups = [group for group in alike.values() if len(set(group.values())) > 1]
    return {name: split for group in groups for name, split in group.items()}


def _few(names: list[str]) -> str:
    return listed(map(shown, names[:3]), len(names))


def _contents(folder: Path) -> tuple[bool, bool]:
    """Whether there are images in a folder, and folders."""
    with os.scandir(folder) as entries:
        seen = [(_is_folder(entry), is_image(entry.name)) for entry in entries if not is_hidden(entry.name)]
    return any(image and not folder for folder, image in seen), any(folder for folder, _ in seen)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
