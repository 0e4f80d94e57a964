"""What detectors and segmenters find in large pictures, window by window, at the pictures' own sizes."""

import dataclasses
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from convert.errors import SettingsError
from crossvit_jax.preprocess import UnreadableImage, open_image, orientation
from train.data.bad_images import BadImages
from train.data.sources import Source
from train.data.streams import device_batches
from train.data.tagged_images import TaggedImages
from train.data.workers import in_workers
from train.devices.decoding import decoding_memory, largest_kept
from train.images.dense import decoded
from train.images.geometry import logits_in_picture, place_pixels, whole_placement
from train.images.tiles import ClassesOfWindows, Tiling, Window, joined, windows
from train.inference.evaluation import without_bad
from train.inference.model import Predictor
from train.tasks.detection import Detection, DetectionScores, boxes_found
from train.tasks.segmentation import SegmentationScores

# One picture is decoded while another one is cut: large ones are to take little memory.
_READ_OPTIONS = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
# In a row of a batch that stands for no window: beyond the last one, or for an unreadable picture
_NOWHERE = {"place": np.int32(-1), "size": np.zeros(2, np.int32), "window": np.zeros(4, np.int32)}


def found_in_windows(
    predictor: Predictor,
    source: Source,
    bad_images: BadImages,
    tiling: Tiling,
    *,
    batch_size: int,
    workers: int,
    tagged: TaggedImages | None = None,
) -> Iterator[tuple[int, tuple[np.ndarray, ...]]]:
    """For each picture that can be read, its place in the source, and what `add_picture` of the task's scores takes:
    boxes, scores and classes, or the class of each pixel. Boxes are x1, y1, x2, y2 in pixels of the picture, the best
    first.

    Each window is resized to the model's size. Boxes that overlap in a picture are suppressed once over all windows;
    logits of pixels in several windows are averaged.

    Args:
        bad_images, workers, tagged: see `train.inference.evaluation.evaluate`.
        batch_size: windows at a time, of one picture or of several: a multiple of the number of devices.
    """
    task = predictor.task
    canvas, exif = task.model_config.image_size, task.config.exif
    shapes = {name: task.batch_shapes(batch_size, training=False)[name] for name in ("image", "mask")}
    read = _Read(source, exif)
    ahead = dataclasses.replace(read, most=largest_kept(workers) // 3)
    pictures = grain.MapDataset.range(len(source)).map(ahead).to_iter_dataset(_READ_OPTIONS)
    batches = _Windows(in_workers(pictures, workers), read, tiling, canvas, batch_size)
    places: deque[dict[str, np.ndarray]] = deque()  # of the windows in batches whose results are not yet there

    def with_places(stream: Iterator[Any]) -> Iterator[Any]:
        for batch in stream:
            places.append({name: batch[name] for name in _NOWHERE})
            yield batch

    def program(model: Any, batch: Any) -> Any:
        return {**task.found(model, batch["image"]), "mask": batch["mask"]}

    with closing(device_batches(batches, predictor.mesh)) as stream:
        run = predictor.run(program, shapes)  # compiles while the first picture is read
        fed = without_bad(with_places(stream), bad_images, shapes, tagged)
        picture = None
        for outputs in run(fed):
            where = places.popleft()
            for row in np.flatnonzero(outputs["mask"]).tolist():
                size, window = tuple(where["size"][row].tolist()), Window(*where["window"][row].tolist())
                if picture is None:
                    picture = (_Boxes if isinstance(task, Detection) else _Classes)(task, size)
                picture.add(window, {name: array[row] for name, array in outputs.items()})
                if (window.top + window.height, window.left + window.width) == size:  # it is the last one
                    yield int(where["place"][row]), picture.found()
                    picture = None


def evaluate_in_windows(
    predictor: Predictor,
    source: Source,
    scores: DetectionScores | SegmentationScores,
    bad_images: BadImages,
    tiling: Tiling,
    *,
    batch_size: int,
    workers: int,
    advance: Callable[[int], Any],
    tagged: TaggedImages | None = None,
) -> float:
    """As `train.inference.evaluation.evaluate`, with pictures cut in windows. There is no loss: that is of pictures as
    the model sees them whole."""
    how = {"batch_size": batch_size, "workers": workers, "tagged": tagged}
    images, done, start = 0, 0, time.perf_counter()
    with closing(found_in_windows(predictor, source, bad_images, tiling, **how)) as pictures:
        for place, found in pictures:
            scores.add_picture(place, *found)
            images += 1
            advance(place + 1 - done)  # unreadable ones before it too
            done = place + 1
    advance(len(source) - done)
    if not images:
        raise SettingsError(f"none of the {len(source)} images could be read")
    return images / (time.perf_counter() - start)


class _Boxes:
    """Collects the boxes in the windows of a picture."""

    def __init__(self, task: Detection, size: tuple[int, int]):
        self._task = task
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, window: Window, outputs: dict[str, np.ndarray]) -> None:
        placement = whole_placement((window.height, window.width), self._task.model_config.image_size)
        boxes, scores, labels = boxes_found(outputs, placement)
        self._parts.append((boxes + (window.left, window.top) * 2, scores, labels))

    def found(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return joined(self._parts, iou_threshold=self._task.iou_threshold, most=self._task.max_detections)


class _Classes:
    """Collects the logits in the windows of a picture."""

    def __init__(self, task: Any, size: tuple[int, int]):
        self._canvas, self._classes = task.model_config.image_size, ClassesOfWindows(size)

    def add(self, window: Window, outputs: dict[str, np.ndarray]) -> None:
        placement = whole_placement((window.height, window.width), self._canvas)
        self._classes.add(window, logits_in_picture(outputs["logits"], placement))

    def found(self) -> tuple[np.ndarray]:
        return (self._classes.classes(),)


# --- the windows of pictures in batches ---


@dataclass(frozen=True)
class _Read:
    """The pixels of a picture; none of an unreadable one. Of a picture of more than `most` pixels only the place:
    several that wait would fill the memory, so each is read again when the one before is done."""

    source: Source
    exif: Any
    most: float = math.inf

    def __call__(self, place: int) -> dict[str, Any]:
        try:
            with decoding_memory().returned():
                sample = self.source[place]
                if _pixel_count(sample["image"]) > self.most:
                    return {"place": np.int32(place)}
                pixels = decoded(sample, self.exif)
        except UnreadableImage:
            return {"place": np.int32(place), "pixels": None, "tagged": np.int8(-1)}
        return {"place": np.int32(place), "pixels": pixels, "tagged": np.int8(orientation(sample["image"]) != 1)}


def _pixel_count(encoded: bytes) -> int:
    try:
        return math.prod(open_image(encoded).size)
    except MemoryError:
        raise
    except Exception:  # whatever Pillow's parsers raise: decoding tells it
        return 0


class _Windows(grain.IterDataset):
    """Batches of the windows of pictures, as `train.data.batches.eval_batches` has them of whole ones, with `place`,
    `size` and `window` of each; the last batch is filled up."""

    def __init__(
        self, pictures: grain.IterDataset, read: _Read, tiling: Tiling, canvas: tuple[int, int], batch_size: int
    ):
        super().__init__(pictures)
        self._cut = (read, tiling, canvas, batch_size)

    def __iter__(self) -> grain.DatasetIterator:
        return _WindowIterator(iter(self._parent), *self._cut)


class _WindowIterator(grain.DatasetIterator):
    def __init__(
        self, pictures: grain.DatasetIterator, read: _Read, tiling: Tiling, canvas: tuple[int, int], batch_size: int
    ):
        super().__init__(pictures)
        self._read = read
        self._tiling, self._canvas, self._batch_size = tiling, canvas, batch_size
        self._rows = self._all_rows()

    def __next__(self) -> dict[str, np.ndarray]:
        rows = list(itertools.islice(self._rows, self._batch_size))
        if not rows:
            raise StopIteration
        rows += [self._blank()] * (self._batch_size - len(rows))
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _all_rows(self) -> Iterator[dict[str, Any]]:
        for picture in self._parent:
            place = picture["place"]
            if "pixels" not in picture:
                picture = self._read(int(place))
            pixels = picture["pixels"]
            if pixels is None:
                yield self._blank(bad=place)
                continue
            size, tagged = pixels.shape[:2], picture["tagged"]
            for window in windows(size, self._tiling):
                yield {
                    "image": self._image(pixels, window),
                    "mask": np.float32(1),
                    "bad": np.int32(-1),
                    "tagged": tagged,
                    "place": place,
                    "size": np.array(size, np.int32),
                    "window": np.array(window, np.int32),
                }
                tagged = np.int8(-1)  # a picture is counted once
            del picture, pixels  # before the next one is decoded

    def _image(self, pixels: np.ndarray, window: Window) -> np.ndarray:
        part = pixels[window.top : window.top + window.height, window.left : window.left + window.width]
        return place_pixels(part, whole_placement(part.shape[:2], self._canvas))

    def _blank(self, bad: int = -1) -> dict[str, Any]:
        image = np.zeros((*self._canvas, 3), np.uint8)
        return {"image": image, "mask": np.float32(0), "bad": np.int32(bad), "tagged": np.int8(-1), **_NOWHERE}

    def get_state(self) -> dict[str, Any]:
        return {}  # Grain's threads ask for it with each batch

    def set_state(self, state: dict[str, Any]) -> None:
        raise NotImplementedError("a prediction is not continued")
