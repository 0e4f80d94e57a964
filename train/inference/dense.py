"""What detectors and segmenters find in image files, at the files' own sizes."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from convert.files import write_whole, writing
from train.data.bad_images import BadImages
from train.data.tagged_images import TaggedImages
from train.images.dense import WholeTransform, decoded
from train.images.geometry import classes_in_picture, whole_placement
from train.images.tiles import Tiling
from train.inference.evaluation import without_bad
from train.inference.image_paths import FileSource
from train.inference.model import Predictor
from train.pictures.dense import mask_png, png_of, with_boxes, with_segments
from train.tasks.detection import SHOWN_SCORE, Detection, boxes_found


class Objects(NamedTuple):
    """What a detector finds in an image, the best first."""

    path: str
    boxes: Float[np.ndarray, "objects 4"]  # x1, y1, x2, y2 in pixels of the image
    scores: Float[np.ndarray, " objects"]
    classes: Int[np.ndarray, " objects"]
    picture: str | None = None  # where they are drawn, if they are


class Segments(NamedTuple):
    """What a segmenter takes the pixels of an image for."""

    path: str
    segments: UInt8[np.ndarray, "height width"]  # the class of each pixel
    picture: str | None = None  # where they are drawn, if they are
    mask: str | None = None  # where they are written as PNG, if they are


def find(
    predictor: Predictor,
    source: FileSource,
    bad_images: BadImages,
    *,
    batch_size: int,
    workers: int,
    pictures: Sequence[Path] | None = None,
    masks: Sequence[Path] | None = None,
    tagged: TaggedImages | None = None,
    tiling: Tiling | None = None,
    advance: Callable[[int], Any] = lambda count: None,
) -> Iterator[Objects | Segments]:
    """The results of image files, in their order, as they are ready.

    Args:
        bad_images: told which images cannot be read, and are left out.
        batch_size: images at a time, or windows of them: a multiple of the number of devices.
        workers: processes that read images; 0: threads of this process.
        pictures: for each image, the PNG in which to draw what is found. Raises NotWritten.
        masks: of a segmenter: for each image, the PNG to write with the class of each pixel. Raises NotWritten.
        tagged: told which images have an EXIF orientation.
        tiling: cut images in windows; none: take them whole.
        advance: told how many more images are done.
    """
    task = predictor.task

    def result(place: int, found: tuple[np.ndarray, ...]) -> Objects | Segments:
        path = source.paths[place]
        if isinstance(task, Detection):
            result = Objects(path, *found)
        else:
            result = Segments(path, *found)
            if masks is not None:
                write_whole(masks[place], mask_png(result.segments))
                result = result._replace(mask=str(masks[place]))
        if pictures is not None:
            with writing(pictures[place]):
                pixels = decoded(source[place], task.config.exif)
                write_whole(pictures[place], png_of(drawn(result, pixels, task.class_names)))
            result = result._replace(picture=str(pictures[place]))
        return result

    how = {"batch_size": batch_size, "workers": workers, "tagged": tagged}
    if tiling is None:
        answers = _found_in_whole(predictor, source, bad_images, **how)
    else:
        from train.inference.tiles import found_in_windows  # late: it imports Grain

        answers = found_in_windows(predictor, source, bad_images, tiling, **how)
    done = 0
    with closing(answers):
        for place, found in answers:
            yield result(place, found)
            advance(place + 1 - done)  # unreadable ones before it too
            done = place + 1
    advance(len(source) - done)


def _found_in_whole(
    predictor: Predictor,
    source: FileSource,
    bad_images: BadImages,
    *,
    batch_size: int,
    workers: int,
    tagged: TaggedImages | None,
) -> Iterator[tuple[int, tuple[np.ndarray, ...]]]:
    """As `found_in_windows`, with each image as a whole."""
    from train.data.batches import eval_batches  # late: Grain takes long to import
    from train.data.streams import device_batches

    task = predictor.task
    canvas, exif = task.model_config.image_size, task.config.exif
    shapes = {name: task.batch_shapes(batch_size, training=False)[name] for name in ("image", "mask")}
    batches = eval_batches(source, WholeTransform(canvas, exif), batch_size=batch_size, workers=workers, rounds=1)
    sizes: deque[np.ndarray] = deque()

    def with_sizes(stream: Iterator[Any]) -> Iterator[Any]:
        for batch in stream:
            sizes.append(np.asarray(batch["size"]))
            yield batch

    def program(model: Any, batch: Any) -> Any:
        return {**task.found(model, batch["image"]), "mask": batch["mask"]}

    with closing(device_batches(batches, predictor.mesh)) as stream:
        run = predictor.run(program, shapes)  # compiles while the first images are read
        fed = without_bad(with_sizes(stream), bad_images, shapes, tagged)
        for number, outputs in enumerate(run(fed)):
            size = sizes.popleft()
            for row in np.flatnonzero(outputs["mask"]).tolist():
                own = {name: array[row] for name, array in outputs.items()}
                yield number * batch_size + row, found_in_picture(own, tuple(size[row].tolist()), canvas)


def found_in_picture(
    outputs: Mapping[str, np.ndarray], size: tuple[int, int], canvas: tuple[int, int]
) -> tuple[np.ndarray, ...]:
    """Boxes, scores and classes of a picture, see `boxes_found`; or of a segmenter the class of each pixel.

    Args:
        outputs: what `found` of the task tells of the whole picture on its canvas.
        size, canvas: of the picture, and of what the model sees: (height, width).
    """
    placement = whole_placement(size, canvas)
    return (
        (classes_in_picture(outputs["logits"], placement),) if "logits" in outputs else boxes_found(outputs, placement)
    )


def drawn(found: Objects | Segments, pixels: UInt8[np.ndarray, "height width 3"], names: Sequence[str]) -> Image.Image:
    """A picture with what is found in it; of objects those with a score of 0.3 or more."""
    if isinstance(found, Segments):
        return with_segments(pixels, found.segments)
    shown = found.scores >= SHOWN_SCORE
    return with_boxes(pixels, found.boxes[shown], found.classes[shown], names, scores=found.scores[shown])
