"""What is told of pictures: classes, objects or segments, in JSON of our own and as the tensors of a protocol."""

import base64
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from convert.export.triton import CLASSES, PROBABILITIES
from train.inference.classify import best_classes
from train.inference.dense import Objects, Segments, drawn, found_in_picture
from train.inference.findings import told
from train.inference.server.bodies import Asked
from train.inference.server.engines.engine import Engine
from train.inference.server.limits import Refusal
from train.inference.server.pictures import Picture
from train.pictures.dense import mask_png, png_of

_LONGEST_OVERLAY = 1600  # pixels of a picture's longer side; of larger ones every second, third, … is drawn


class Tensor(NamedTuple):
    """An output of the Open Inference Protocol."""

    name: str
    datatype: str
    shape: tuple[int, ...]  # -1: any


class Answers(Protocol):
    """What one kind of model is asked for, and answers."""

    options: tuple[str, ...]  # the fields of `Asked` that it heeds, beside the pictures
    outputs: tuple[Tensor, ...]
    takes_long: bool  # so that the event loop would wait for it, and large outputs for one another

    def told(self, row: Any, picture: Picture, asked: Asked) -> dict[str, Any]:
        """The result of a picture as JSON has it.

        Args:
            row: what `Engine.compute` returns of its image.
        """

    def check(self, pictures: Sequence[Picture]) -> None:
        """Raises Refusal if the tensors of these pictures would not have one shape."""

    def tensors(self, row: Any, picture: Picture) -> tuple[np.ndarray, ...]:
        """The `outputs` of a picture, without their first axis."""


def answers_of(engine: Engine) -> Answers:
    """The answers of an engine."""
    kinds = {"classification": _Classes, "detection": _Objects, "segmentation": _Segments}
    return kinds[engine.config.task](engine)


class _Classes:
    takes_long = False
    options = ("top_k", "attention")

    def __init__(self, engine: Engine):
        self._names = engine.class_names
        shape = (-1, len(engine.class_names))
        self.outputs = (Tensor(PROBABILITIES, "FP32", shape), Tensor(CLASSES, "INT64", shape))

    def told(self, row: np.ndarray, picture: Picture, asked: Asked) -> dict[str, Any]:
        best = best_classes(row, self._names, asked.top_k)
        keys = [{"class": one.class_name, "index": one.index, "probability": one.probability} for one in best]
        return {"predictions": keys}

    def check(self, pictures: Sequence[Picture]) -> None:
        pass

    def tensors(self, row: np.ndarray, picture: Picture) -> tuple[np.ndarray, ...]:
        return row.astype("<f4"), np.argsort(-row, kind="stable").astype("<i8")


class _Dense:
    takes_long = True

    def __init__(self, engine: Engine):
        self._names, self._canvas = engine.class_names, engine.config.image_size

    def _in_picture(self, row: dict[str, np.ndarray], picture: Picture) -> tuple[np.ndarray, ...]:
        return found_in_picture(row, picture.size, self._canvas)

    def _told(self, found: Objects | Segments, picture: Picture) -> dict[str, Any]:
        """As `train.predict --format jsonl` has it, with the picture's size; and drawn, if its pixels are kept."""
        result = {"size": list(picture.size), **told(found, self._names)}
        return result if picture.pixels is None else result | {"picture": self._overlay(found, picture.pixels)}

    def _overlay(self, found: Objects | Segments, pixels: np.ndarray) -> str:
        step = -(-max(pixels.shape[:2]) // _LONGEST_OVERLAY)
        if isinstance(found, Segments):
            smaller = found._replace(segments=found.segments[::step, ::step])
        else:
            smaller = found._replace(boxes=found.boxes / step)
        return _base64(png_of(drawn(smaller, np.ascontiguousarray(pixels[::step, ::step]), self._names)))


class _Objects(_Dense):
    options = ("overlay",)

    def __init__(self, engine: Engine):
        super().__init__(engine)
        self._most = engine.most_objects
        shape = (-1, self._most)
        self.outputs = (
            Tensor("boxes", "FP32", (*shape, 4)),
            Tensor("scores", "FP32", shape),
            Tensor("labels", "INT64", shape),
            Tensor("valid", "BOOL", shape),
        )

    def told(self, row: dict[str, np.ndarray], picture: Picture, asked: Asked) -> dict[str, Any]:
        return self._told(Objects("", *self._in_picture(row, picture)), picture)

    def check(self, pictures: Sequence[Picture]) -> None:
        pass

    def tensors(self, row: dict[str, np.ndarray], picture: Picture) -> tuple[np.ndarray, ...]:
        found = self._in_picture(row, picture)
        missing = self._most - len(found[0])
        dtypes = ("<f4", "<f4", "<i8", "?")
        arrays = (*found, np.ones(len(found[0])))
        return tuple(
            np.pad(array, ((0, missing), *((0, 0),) * (array.ndim - 1))).astype(dtype)
            for array, dtype in zip(arrays, dtypes, strict=True)
        )


class _Segments(_Dense):
    options = ("mask", "overlay")
    outputs = (Tensor("segments", "UINT8", (-1, -1, -1)),)

    def told(self, row: dict[str, np.ndarray], picture: Picture, asked: Asked) -> dict[str, Any]:
        found = Segments("", *self._in_picture(row, picture))
        result = self._told(found, picture)
        return result | {"mask": _base64(mask_png(found.segments))} if asked.mask else result

    def check(self, pictures: Sequence[Picture]) -> None:
        sizes = sorted({picture.size for picture in pictures})
        if len(sizes) > 1:
            (height, width), (rows, columns) = sizes[:2]
            why = f"these have {width} x {height} and {columns} x {rows} pixels"
            raise Refusal(400, f"segments are a tensor of pictures of one size, and {why}: ask for each alone")

    def tensors(self, row: dict[str, np.ndarray], picture: Picture) -> tuple[np.ndarray, ...]:
        return self._in_picture(row, picture)


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
