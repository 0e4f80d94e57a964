"""Predictions as text: a table to read, CSV, or lines of JSON. Each comes in pieces, image by image."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from convert.files import csv_text, shown

WIDEST_PATH, WIDEST_CLASS = 100, 40  # characters; longer ones stand out of their column
_LONGEST_CLASS = 400  # of which a table shows no more


@dataclass(frozen=True)
class Prediction:
    """One class that an image may belong to."""

    class_name: str  # the index as text where the weights know no names
    index: int
    probability: float


class Table:
    """Aligned columns, the path on the first line of its image."""

    def __init__(self, paths: Sequence[str], class_names: Sequence[str]):
        self._path_width = min(WIDEST_PATH, max(len(shown(path)) for path in (*paths, "image")))
        self._class_width = min(WIDEST_CLASS, max(len(shown(name)) for name in (*class_names, "class")))
        self.header = self._line("image", "class", "probability")

    def entry(self, path: str, predictions: Sequence[Prediction], picture: str | None) -> str:
        """An image with its predictions, the best first, and where its picture of attention is, if it has one."""
        names = [shown(path)] + [""] * (len(predictions) - 1)
        rows = zip(names, predictions, strict=True)
        return "".join(self._line(name, shown_class(p.class_name), f"{100 * p.probability:9.2f} %") for name, p in rows)

    def _line(self, path: str, class_name: str, probability: str) -> str:
        return f"{path:{self._path_width}}  {class_name:{self._class_width}}  {probability}\n"


class Csv:
    """A line for each prediction, its rank counted from 1."""

    def __init__(self, paths: Sequence[str], class_names: Sequence[str]):
        self.header = csv_text([["path", "rank", "class", "index", "probability"]])

    def entry(self, path: str, predictions: Sequence[Prediction], picture: str | None) -> str:
        return csv_text(
            [path, rank, shown(p.class_name), p.index, _rounded(p.probability)]
            for rank, p in enumerate(predictions, start=1)
        )


class JsonLines:
    """An object for each image, in ASCII: bytes of a file name that are no text become \\udc80 to \\udcff."""

    def __init__(self, paths: Sequence[str], class_names: Sequence[str]):
        self.header = ""

    def entry(self, path: str, predictions: Sequence[Prediction], picture: str | None) -> str:
        found = [{"class": p.class_name, "index": p.index, "probability": _rounded(p.probability)} for p in predictions]
        line = {"path": path, "predictions": found} | ({"attention": picture} if picture else {})
        return json.dumps(line) + "\n"


FORMATS: dict[str, type[Table | Csv | JsonLines]] = {"table": Table, "csv": Csv, "jsonl": JsonLines}


def shown_class(class_name: str) -> str:
    """A name that somebody's weights have, as a table can show it."""
    name = shown(class_name)
    return name if len(name) <= _LONGEST_CLASS else f"{name[:_LONGEST_CLASS]}…"


def _rounded(probability: float) -> float:
    """To six digits: what float32 has."""
    return float(f"{probability:.6g}")
