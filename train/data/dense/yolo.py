"""Boxes in YOLO's text files, one for each picture, with a `data.yaml` that names folders and classes."""

import os
from pathlib import Path
from typing import Any

import yaml

from convert.errors import SettingsError, one_line
from convert.image_files import image_files, is_image
from crossvit_jax.config import shown_value
from crossvit_jax.preprocess import Exif
from train.data.dense.annotation_files import read_annotations
from train.data.dense.boxes import Annotations, BoxFiles, box_sets
from train.data.dense.samples import DenseSets

_HELD_OUT = ("val", "valid", "test")  # the first that is there
_ROUNDING = 1e-3  # by which shares may be above 1
_LARGEST_YAML, _DEEPEST = 2**20, 20  # bytes, which take seconds; levels


class _Loader(yaml.SafeLoader):
    """Takes no aliases, since a few lines with them stand for more than a memory holds, and no deep nesting."""

    _levels = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not read")
        if self._levels == _DEEPEST:
            raise yaml.YAMLError("its brackets are nested too deeply")
        self._levels += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._levels -= 1


def open_yolo(path: Path, *, val_fraction: float, seed: int, exif: Exif) -> DenseSets:
    """A `data.yaml` with `names`, `train`, `val` and, perhaps, `path`; or the folder that holds it.

    `train` and `val` are folders of pictures, files that list them, or several of these. The boxes of
    `…/images/…/a.jpg` are in `…/labels/…/a.txt`, a line for each: class, then centre, width and height as shares of the
    picture's, or the corners of a polygon, of which the box is taken. A picture without such a file has no objects.

    Raises SettingsError, naming file and value, for whatever does not fit together.
    """
    file = path / "data.yaml" if path.is_dir() else path
    content = _read(file)
    names = _class_names(file, content)
    root = _root(file, content)
    held_out = next((split for split in _HELD_OUT if content.get(split)), None)
    if not content.get("train"):
        raise SettingsError(f"{file} names no pictures to train on: it needs train")
    notes: list[str] = []
    sides: list[BoxFiles] = []
    for split in ("train", held_out) if held_out else ("train",):
        pictures = _pictures(file, root, split, content[split])
        annotations = Annotations(str(file), Path(os.path.abspath(root)), exif)
        for image_id, picture in enumerate(pictures, start=1):
            _add(annotations, picture, root, len(names), image_id)
        source, found = annotations.source()
        sides.append(source)
        notes += found
    return box_sets(
        sides[0],
        sides[1] if len(sides) > 1 else None,
        names,
        origin=str(file),
        held_out_split=held_out,
        val_fraction=val_fraction,
        seed=seed,
        notes=notes,
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        content = yaml.load(read_annotations(file, at_most=_LARGEST_YAML), _Loader)
    except SettingsError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError) as error:  # a date of month 13, say
        raise SettingsError(f"{file} is no YAML: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise SettingsError(f"{file} is no data.yaml: it needs names, train and val")
    return content


def _class_names(file: Path, content: dict[str, Any]) -> list[str]:
    names = content.get("names")
    if isinstance(names, dict):
        if set(names) != set(range(len(names))):
            raise SettingsError(f"{file}: names must be numbered from 0 without gaps; got {shown_value(list(names))}")
        names = [names[place] for place in range(len(names))]
    if not isinstance(names, list) or not names:
        raise SettingsError(f"{file} names no classes: names must be a list; got {shown_value(names)}")
    count = content.get("nc", len(names))
    if count != len(names):
        raise SettingsError(f"{file} tells nc {shown_value(count)}, and has {len(names)} names")
    odd = [name for name in names if not isinstance(name, str | int | float)]
    if odd:
        raise SettingsError(f"{file}: names must be texts; got {shown_value(odd[0])}")
    names = list(map(str, names))
    if len(set(names)) < len(names):
        raise SettingsError(f"{file} has the same name for two classes")
    return names


def _root(file: Path, content: dict[str, Any]) -> Path:
    """What the folders are relative to: `path` where it is there, as seen from the file, or else the file's folder."""
    named = content.get("path")
    if named is not None and not isinstance(named, str):
        raise SettingsError(f"{file}: path must be that of a folder; got {shown_value(named)}")
    for candidate in (file.parent / named, Path(named)) if named else ():
        if candidate.is_dir():
            return candidate
    return file.parent


def _pictures(file: Path, root: Path, split: str, named: Any) -> list[Path]:
    """The picture files of a split."""
    pictures: list[Path] = []
    texts = named if isinstance(named, list) else [named]
    odd = [text for text in texts if not isinstance(text, str)]
    if odd:
        raise SettingsError(f"{file}: {split} must be a path, or a list of some; got {shown_value(odd[0])}")
    for text in dict.fromkeys(texts):  # a folder that is named a thousand times is looked through once
        # Roboflow writes ../train/images for what lies beside the file
        tried = [root / text, root / text.removeprefix("../")]
        found = next((path for path in tried if path.exists()), None)
        if found is None:
            raise SettingsError(f"{file}: {split} is {text}, and there is no {tried[0]}")
        if found.is_dir():
            pictures += map(Path, image_files(found))
        else:
            listing = os.fsdecode(read_annotations(found)).splitlines()
            lines = [line.strip() for line in listing if line.strip()]
            pictures += [found.parent / line if line.startswith("./") else root / line for line in lines]
    if not pictures:
        raise SettingsError(f"{file}: {split} is {shown_value(named)}, and there are no pictures")
    wrong = [picture for picture in pictures if not is_image(picture.name)]
    if wrong:
        raise SettingsError(f"{file}: {split} lists {wrong[0]}, whose suffix is none of an image")
    return list(dict.fromkeys(pictures))


def _labels_of(picture: Path) -> Path:
    """Where the boxes of a picture are: `labels` for the last folder `images` on the way to it."""
    parts = list(picture.parts)
    for place in reversed(range(len(parts) - 1)):
        if parts[place] == "images":
            parts[place] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _add(annotations: Annotations, picture: Path, root: Path, num_classes: int, image_id: int) -> None:
    file = _labels_of(picture)
    place = annotations.add_picture(os.path.relpath(picture, root), image_id=image_id, size=None, origin=str(file))
    if not os.path.lexists(file):
        return
    lines = read_annotations(file).decode("utf-8", "replace").splitlines()
    size = annotations.size_of(place)
    if size is None:
        return  # the picture cannot be read, which is told when it is
    height, width = size
    for number, line in enumerate(lines, start=1):
        if line.strip():
            label, (x1, y1, x2, y2) = _parsed(line, f"line {number} of {file}", num_classes)
            annotations.add_box(place, (x1 * width, y1 * height, x2 * width, y2 * height), label)


def _parsed(line: str, where: str, num_classes: int) -> tuple[int, tuple[float, float, float, float]]:
    """Class, and box as shares of the picture."""
    try:
        label, *values = map(float, line.split())
    except ValueError:
        raise SettingsError(f"{where} must be numbers; got {shown_value(line.strip())}") from None
    if not (label.is_integer() and 0 <= label < num_classes):
        raise SettingsError(f"{where} is of class {label:g}: there are {num_classes}, numbered from 0")
    if not all(-_ROUNDING <= value <= 1 + _ROUNDING for value in values):
        raise SettingsError(f"{where} has values beyond 0 to 1, shares of the picture: got {shown_value(line.strip())}")
    if len(values) == 4:
        x, y, width, height = values
        return int(label), (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    if len(values) >= 6 and len(values) % 2 == 0:
        across, down = values[::2], values[1::2]
        return int(label), (min(across), min(down), max(across), max(down))
    raise SettingsError(f"{where} must be a class and 4 numbers, or a polygon; got {shown_value(line.strip())}")
