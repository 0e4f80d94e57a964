"""What is found in images as text: a table to read, CSV, or lines of JSON. Each comes in pieces, image by image."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from convert.files import csv_text, shown
from train.inference.dense import Objects, Segments
from train.inference.predictions import WIDEST_CLASS, WIDEST_PATH, shown_class
from train.tasks.detection import coco_results


class Table:
    """Aligned columns, the path on the first line of its image: objects, or the shares of the classes' pixels."""

    def __init__(self, paths: Sequence[str], class_names: Sequence[str], *, boxes: bool):
        self._names = list(map(shown_class, class_names))
        self._path_width = min(WIDEST_PATH, max(len(shown(path)) for path in (*paths, "image")))
        self._class_width = min(WIDEST_CLASS, max(len(name) for name in (*self._names, "class", "nothing")))
        columns = "   score     x1     y1     x2     y2" if boxes else "   pixels"
        self.header = self._line("image", "class", columns)

    def entry(self, found: Objects | Segments) -> str:
        if isinstance(found, Segments):
            rows = [(self._names[c], f"{100 * share:7.2f} %") for c, share in _shares(found)]
        else:
            objects = zip(found.classes, found.scores, found.boxes, strict=True)
            rows = [(self._names[c], f"{score:8.3f}" + "".join(f"{x:7.1f}" for x in box)) for c, score, box in objects]
        first = [shown(found.path)]
        rows = rows or [("nothing", "")]
        return "".join(self._line(path, *row) for path, row in zip(first + [""] * (len(rows) - 1), rows, strict=True))

    def _line(self, path: str, class_name: str, rest: str) -> str:
        return f"{path:{self._path_width}}  {class_name:{self._class_width}}{rest}".rstrip() + "\n"


class Csv:
    """A line for each object, or for each class that pixels of an image are taken for."""

    def __init__(self, paths: Sequence[str], class_names: Sequence[str], *, boxes: bool):
        self._names = list(map(shown, class_names))
        columns = ["score", "x1", "y1", "x2", "y2"] if boxes else ["pixels", "share"]
        self.header = csv_text([["path", "class", "index", *columns]])

    def entry(self, found: Objects | Segments) -> str:
        names = self._names
        if isinstance(found, Segments):
            total = found.segments.size
            rows = [[names[c], c, round(share * total), _rounded(share)] for c, share in _shares(found)]
        else:
            objects = zip(found.classes.tolist(), found.scores, found.boxes, strict=True)
            rows = [[names[c], c, _rounded(score), *map(_rounded, box)] for c, score, box in objects]
        return csv_text([found.path, *row] for row in rows)


class JsonLines:
    """An object for each image, in ASCII: bytes of a file name that are no text become \\udc80 to \\udcff."""

    def __init__(self, paths: Sequence[str], class_names: Sequence[str], *, boxes: bool):
        self._names = class_names
        self.header = ""

    def entry(self, found: Objects | Segments) -> str:
        line = {"path": found.path} | told(found, self._names)
        line |= {"mask": found.mask} if isinstance(found, Segments) and found.mask else {}
        line |= {"picture": found.picture} if found.picture else {}
        return json.dumps(line) + "\n"


FORMATS: dict[str, type[Table | Csv | JsonLines]] = {"table": Table, "csv": Csv, "jsonl": JsonLines}


def told(found: Objects | Segments, names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """What is found in an image as JSON has it: `objects`, the best first, or the `classes` of its pixels with their
    shares, the largest first.

    Args:
        names: of the classes.
    """
    if isinstance(found, Segments):
        return {"classes": [{"class": names[c], "index": c, "share": _rounded(s)} for c, s in _shares(found)]}
    objects = zip(found.classes.tolist(), found.scores, found.boxes, strict=True)
    return {
        "objects": [
            {"class": names[c], "index": c, "score": _rounded(score), "box": list(map(_rounded, box))}
            for c, score, box in objects
        ]
    }


def coco_file(results: Sequence[Objects], paths: Sequence[str]) -> bytes:
    """COCO's results: images are numbered from 1 in the order of the paths, classes from 0; each result also has the
    path."""
    numbers = {path: number for number, path in enumerate(paths, start=1)}
    entries = []
    for found in results:
        ids = range(int(found.classes.max(initial=-1)) + 1)
        boxes = coco_results(numbers[found.path], found.boxes, found.scores, found.classes, ids)
        entries += [{**entry, "file_name": found.path} for entry in boxes]
    return (json.dumps(entries) + "\n").encode()


def _shares(found: Segments) -> list[tuple[int, float]]:
    """The classes of an image's pixels and their shares, the largest first."""
    counts = np.bincount(found.segments.ravel())
    order = np.argsort(-counts, kind="stable")
    return [(int(c), counts[c] / found.segments.size) for c in order if counts[c]]


def _rounded(value: float) -> float:
    """To six digits: what float32 has."""
    return float(f"{value:.6g}")
