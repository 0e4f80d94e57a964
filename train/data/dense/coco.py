"""Boxes in COCO's JSON: its official folders, Roboflow's, or a single file."""

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convert.errors import SettingsError, listed, one_line
from convert.files import shown
from crossvit_jax.config import shown_value
from crossvit_jax.preprocess import Exif
from train.data.dense.annotation_files import read_annotations
from train.data.dense.boxes import Annotations, BoxFiles, box_sets
from train.data.dense.samples import DenseSets

_ROBOFLOW = "_annotations.coco.json"
_HELD_OUT = ("val", "valid", "validation", "test")  # the first that is there
_LARGEST = 2**53  # of an id, a side or an area: what other programs can hold as well


def open_coco(path: Path, *, val_fraction: float, seed: int, exif: Exif) -> DenseSets:
    """A folder with `annotations/instances_train*.json` and, perhaps, `instances_val*.json`; with
    `train/_annotations.coco.json` and `valid/`; or a JSON file, whose pictures are partly held out.

    Classes are in the order of their ids, which may have gaps. Crowds (`iscrowd`) are not trained on.

    Raises SettingsError, naming file and value, for whatever does not fit together.
    """
    if path.is_file():
        files, held_out_split = [path], None
    else:
        files, held_out_split = _find(path)
    contents = [_read(file) for file in files]
    categories, notes = _categories(files, contents)
    sides: list[BoxFiles] = []
    for file, content in zip(files, contents, strict=True):
        source, found = _source(file, content, list(categories), exif)
        sides.append(source)
        notes += found
    return box_sets(
        sides[0],
        sides[1] if len(sides) > 1 else None,
        list(categories.values()),
        origin=str(path),
        held_out_split=held_out_split,
        category_ids=list(categories),
        val_fraction=val_fraction,
        seed=seed,
        notes=notes,
    )


def _find(root: Path) -> tuple[list[Path], str | None]:
    """The file for training and, if there is one, that of the held-out pictures, whose split is told."""
    if not root.is_dir():
        raise SettingsError(f"there is no file or folder {root}")
    for pattern in (f"{{}}/{_ROBOFLOW}", "annotations/instances_{}*.json", "instances_{}*.json"):
        found = sorted(root.glob(pattern.format("train")))
        if len(found) > 1:
            raise SettingsError(f"{root} has more than one file for training: {listed(map(str, found))}; name one")
        for split in _HELD_OUT if found else ():
            held_out = sorted(root.glob(pattern.format(split)))
            if len(held_out) > 1:
                raise SettingsError(f"{root} has more than one file for {split}: {listed(map(str, held_out))}")
            if held_out:
                return [*found, *held_out], split
        if found:
            return found, None
    raise SettingsError(
        f"{root} has neither annotations/instances_train*.json nor train/{_ROBOFLOW}; a file of another name is "
        "coco:FILE.json"
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_annotations(file))
    except RecursionError:
        raise SettingsError(f"{file} is no JSON: its brackets are nested too deeply") from None
    except SettingsError:
        raise
    except ValueError as error:
        raise SettingsError(f"{file} is no JSON: {one_line(error)}") from None
    wanted = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in wanted):
        raise SettingsError(f"{file} is no file of COCO's objects: it needs the lists {', '.join(wanted)}")
    for key in wanted:
        for entry in content[key]:
            if not isinstance(entry, dict):
                raise SettingsError(f"{file}: {key} must be a list of objects; got {shown_value(entry)} in it")
    return content


def _categories(files: Sequence[Path], contents: Sequence[dict[str, Any]]) -> tuple[dict[int, str], list[str]]:
    """The names of the classes by their ids, sorted by these; the same in all files."""
    found: list[dict[int, str]] = []
    for file, content in zip(files, contents, strict=True):
        pairs = [(_get(file, entry, "id", int), _get(file, entry, "name", str)) for entry in content["categories"]]
        for what, values in (("id", [id for id, _ in pairs]), ("name", [name for _, name in pairs])):
            twice = [value for value, count in Counter(values).items() if count > 1]
            if twice:
                raise SettingsError(f"{file} has more than one category of the {what} {twice[0]!r}")
        found.append(dict(sorted(pairs)))
    if found[0] != found[-1]:
        different = [str(pair) for pair in found[0].items() ^ found[-1].items()]
        raise SettingsError(f"{files[0]} and {files[-1]} have different categories: {listed(sorted(different)[:5])}")
    return _without_group(found[0], contents)


def _without_group(categories: dict[int, str], contents: Sequence[dict[str, Any]]) -> tuple[dict[int, str], list[str]]:
    """Roboflow's first category is the group of all others, and no class."""
    used = {_id_of(entry, "category_id") for content in contents for entry in content["annotations"]}
    groups = {_id_of(entry, "supercategory") for entry in contents[0]["categories"]}
    for entry in contents[0]["categories"]:
        if entry["name"] in groups and entry.get("supercategory") == "none" and entry["id"] not in used:
            rest = {id: name for id, name in categories.items() if id != entry["id"]}
            return rest, [f"category {shown(entry['name'])} is taken for the group of the others, and no class"]
    return categories, []


def _source(file: Path, content: dict[str, Any], category_ids: list[int], exif: Exif) -> tuple[BoxFiles, list[str]]:
    images = content["images"]
    names = [_get(file, entry, "file_name", str) for entry in images]
    annotations = Annotations(str(file), _pictures_of(file, names), exif)
    places: dict[int, int] = {}
    for entry, name in zip(images, names, strict=True):
        image_id = _get(file, entry, "id", int)
        if image_id in places:
            raise SettingsError(f"{file} has more than one image of the id {image_id}")
        sized = "height" in entry and "width" in entry
        size = (_get(file, entry, "height", int), _get(file, entry, "width", int)) if sized else None
        places[image_id] = annotations.add_picture(name, image_id=image_id, size=size)
    labels = {id: label for label, id in enumerate(category_ids)}
    seen: set[Any] = set()
    twice = 0
    for entry in content["annotations"]:
        own_id = _id_of(entry, "id")
        what = f"annotation {'' if own_id is None else own_id} of {file}".replace("  ", " ")
        image_id, category = (_get(file, entry, key, int) for key in ("image_id", "category_id"))
        if image_id not in places:
            raise SettingsError(f"{what} is for image {image_id}, and there is none of this id")
        if category not in labels:
            raise SettingsError(f"{what} is of category {category}, and there is none of this id")
        box = entry.get("bbox")
        if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))):
            raise SettingsError(f"{what} has as bbox {shown_value(box)}: it needs four numbers, x, y, width, height")
        x, y, width, height = box
        area, crowd = entry.get("area"), entry.get("iscrowd") or 0
        if area is not None and not (_is_number(area) and 0 <= area < math.inf):
            raise SettingsError(f"{what} has as area {shown_value(area)}: it needs a number, 0 or more, or none")
        if crowd not in (0, 1):
            raise SettingsError(f"{what} has as iscrowd {shown_value(crowd)}: it needs 0 or 1")
        crowd = bool(crowd)
        annotations.add_box(places[image_id], (x, y, x + width, y + height), labels[category], crowd=crowd, area=area)
        twice += own_id in seen
        seen.add(own_id)
    source, notes = annotations.source()
    if twice and None not in seen:
        notes.append(f"{file}: {twice} annotations have the id of another one; all are taken")
    return source, notes


def _pictures_of(file: Path, names: Sequence[str]) -> Path:
    """The folder that the names of the pictures of a file start from: the first that has the first of them."""
    root = file.parent.parent if file.parent.name == "annotations" else file.parent
    split = re.sub(r"^instances_", "", file.stem)
    candidates = [root / split, root / "images" / split, root / "images", root, file.parent]
    candidates = list(dict.fromkeys(candidates))
    for folder in candidates if names else candidates[:1]:
        if not names or any((folder / name).is_file() for name in names[:20]):
            return folder
    raise SettingsError(
        f"the pictures of {file}, such as {shown(names[0])}, are in none of {listed(map(str, candidates))}"
    )


def _get(file: Path, entry: Any, key: str, kind: type) -> Any:
    value = entry.get(key)
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, kind) or isinstance(value, bool) or (kind is int and not _is_number(value)):
        wanted = "a whole number" if kind is int else "text"
        raise SettingsError(f"{file}: {key} must be {wanted}; got {shown_value(value)} in {shown_value(entry)}")
    return value


def _id_of(entry: dict[str, Any], key: str) -> Any:
    """A value by which entries are told apart; None where it is of no kind that does."""
    value = entry.get(key)
    return value if isinstance(value, int | float | str) else None


def _is_number(value: Any) -> bool:
    """Also of what is not finite, which is told with the box; not of numbers that no float holds."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) <= _LARGEST)
