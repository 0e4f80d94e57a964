"""The one way through which images go that are not trained on: held-out images, and those to evaluate or to predict."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import Any

from convert.errors import SettingsError
from train.data.bad_images import BadImages
from train.data.sources import Source
from train.data.tagged_images import TaggedImages
from train.inference.model import Predictor
from train.tasks.task import Batch, Scores


def without_bad(
    stream: Iterator[Batch], bad_images: BadImages, names: Iterable[str], tagged: TaggedImages | None = None
) -> Iterator[Batch]:
    """The batches of a stream as a program takes them, with these names only.

    Args:
        bad_images: told which images cannot be read.
        tagged: told which have an EXIF orientation.
    """
    for batch in stream:
        bad_images.add(batch["bad_indices"])
        if tagged is not None:
            tagged.add(batch["tagged"])
        yield {name: batch[name] for name in names}


def evaluate(
    predictor: Predictor,
    source: Source,
    scores: Scores,
    bad_images: BadImages,
    *,
    batch_size: int,
    workers: int,
    advance: Callable[[int], Any],
    tagged: TaggedImages | None = None,
) -> float:
    """Runs a model on all images of a source; returns how many there were in a second.

    Args:
        scores: to which the outputs are added.
        bad_images: told which images cannot be read.
        batch_size: a multiple of the number of devices.
        workers: processes that read images; 0: threads of this process.
        advance: told how many more images are done.
        tagged: told which images have an EXIF orientation.

    Raises:
        SettingsError: no image could be read.
        DataError: the data set cannot be read any further.
    """
    from train.data.batches import eval_batches  # late: Grain takes long to import
    from train.data.streams import device_batches

    task = predictor.task
    transform, shapes = task.transform(training=False), task.batch_shapes(batch_size, training=False)
    batches = eval_batches(source, transform, batch_size=batch_size, workers=workers, rounds=1)

    with closing(device_batches(batches, predictor.mesh)) as stream:
        run = predictor.run(task.evaluate, shapes)  # compiles while the first images are read
        batches = without_bad(stream, bad_images, shapes, tagged)
        first = iter([next(batches)])
        start = time.perf_counter()  # not before: the start of worker processes says nothing about speed
        for place, outputs in enumerate(run(itertools.chain(first, batches))):
            scores.add(outputs)
            advance(min(batch_size, len(source) - place * batch_size))
    images = scores.values()["images"]
    if not images:
        raise SettingsError(f"none of the {len(source)} images could be read")
    return images / (time.perf_counter() - start)
