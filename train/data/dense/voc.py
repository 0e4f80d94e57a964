"""Boxes in Pascal VOC's XML files, one for each picture."""

import math
import os
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

from convert.errors import SettingsError, one_line
from convert.image_files import is_hidden, is_image
from crossvit_jax.config import shown_value
from crossvit_jax.preprocess import Exif
from train.data.dense.annotation_files import read_annotations, read_lines
from train.data.dense.boxes import Annotations, box_sets
from train.data.dense.samples import DenseSets

_LISTS = "ImageSets/Main"
_HELD_OUT = ("val", "test")  # the first that is there


def open_voc(path: Path, *, val_fraction: float, seed: int, exif: Exif) -> DenseSets:
    """A folder with `Annotations/*.xml`, `JPEGImages/` and, perhaps, `ImageSets/Main/train.txt` and `val.txt`; or with
    XML files beside their pictures.

    VOC counts pixels from 1, and both ends of a box belong to it: 1 is taken off xmin and ymin. Objects marked as
    `difficult` are taken for crowds: not trained on, and ignored in scores. Classes are sorted as text.

    Raises SettingsError, naming file and value, for whatever does not fit together.
    """
    if not path.is_dir():
        raise SettingsError(f"there is no folder {path}")
    xml_folder = path / "Annotations" if (path / "Annotations").is_dir() else path
    files = {file.stem: file for file in sorted(xml_folder.glob("*.xml")) if not is_hidden(file.name)}
    if not files:
        raise SettingsError(f"{path} has no XML files, neither in Annotations/ nor itself")
    pictures = _pictures(path)
    parsed = {name: _Picture(file) for name, file in files.items()}
    names = sorted({name for picture in parsed.values() for name, *_ in picture.objects})
    chosen, held_out_split = _split(path, files)
    notes: list[str] = []
    sides = []
    for side in chosen:
        annotations = Annotations(str(path), path, exif)
        for image_id, name in enumerate(side, start=1):
            _add(annotations, parsed[name], pictures, names, image_id)
        source, found = annotations.source()
        sides.append(source)
        notes += found
    return box_sets(
        sides[0],
        sides[1] if len(sides) > 1 else None,
        names,
        origin=str(path),
        held_out_split=held_out_split,
        val_fraction=val_fraction,
        seed=seed,
        notes=notes,
    )


class _Picture:
    """What an XML file tells: `filename`, `size` (height, width), and `objects`: class, box, whether difficult."""

    def __init__(self, file: Path):
        self.file = file
        try:
            root = ElementTree.fromstring(read_annotations(file))
        except (ElementTree.ParseError, LookupError) as error:  # the latter for an encoding that nobody knows
            raise SettingsError(f"{file} is no XML: {one_line(error)}") from None
        self.filename = (root.findtext("filename") or "").strip()
        size = root.find("size")
        self.size: tuple[int, int] | None = None
        if size is not None:
            height, width = (self._number(size, name) for name in ("height", "width"))
            self.size = (round(height), round(width)) if height > 0 and width > 0 else None  # some tools write 0
        self.objects: list[tuple[str, tuple[float, float, float, float], bool]] = []
        for found in root.iter("object"):
            name = (found.findtext("name") or "").strip()
            box = found.find("bndbox")
            if not name or box is None:
                raise SettingsError(f"{file} has an object without {'bndbox' if name else 'name'}")
            left, top, right, bottom = (self._number(box, key) for key in ("xmin", "ymin", "xmax", "ymax"))
            difficult = (found.findtext("difficult") or "0").strip() not in ("0", "")
            self.objects.append((name, (left - 1, top - 1, right, bottom), difficult))

    def _number(self, element: ElementTree.Element, name: str) -> float:
        text = (element.findtext(name) or "").strip()
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise SettingsError(f"{self.file}: {name} must be a number; got {shown_value(text)}")
        return value


def _add(
    annotations: Annotations, picture: _Picture, pictures: dict[str, str], class_names: list[str], image_id: int
) -> None:
    # the name of the XML file is trusted more than what it says inside, which tools leave when files are renamed
    names_itself = Path(picture.filename).stem == picture.file.stem
    tried = (picture.filename if names_itself else "", picture.file.stem, Path(picture.filename).stem)
    found = next((pictures[name] for name in tried if name in pictures), None)
    if found is None:
        wanted = picture.filename or picture.file.stem
        raise SettingsError(f"{picture.file} is for the picture {wanted}, which is missing")
    place = annotations.add_picture(found, image_id=image_id, size=picture.size, origin=str(picture.file))
    for name, box, difficult in picture.objects:
        annotations.add_box(place, box, class_names.index(name), crowd=difficult)


def _pictures(root: Path) -> dict[str, str]:
    """The image files of a data set, relative to its folder, by their names with and without suffix."""
    found: dict[str, str] = {}
    for folder in ("JPEGImages", "images", "Annotations", "."):
        if (root / folder).is_dir():
            for name in sorted(os.listdir(root / folder)):
                if is_image(name) and not is_hidden(name):
                    for key in (name, Path(name).stem):
                        found.setdefault(key, os.path.normpath(os.path.join(folder, name)))
    return found


def _split(root: Path, files: Iterable[str]) -> tuple[list[list[str]], str | None]:
    """The names of the pictures to train on and, where lists tell them, of those held out."""
    lists = root / _LISTS
    if not (lists / "train.txt").is_file():
        return [sorted(files)], None
    held_out = next((split for split in _HELD_OUT if (lists / f"{split}.txt").is_file()), None)
    chosen = []
    for split in ("train", held_out) if held_out else ("train",):
        file = lists / f"{split}.txt"
        names = [line.split()[0] for line in read_lines(file) if line]
        unknown = [name for name in names if name not in files]
        if unknown:
            raise SettingsError(f"{file} names {unknown[0]}, and there is no XML file for it")
        chosen.append(list(dict.fromkeys(names)))
    return chosen, held_out
