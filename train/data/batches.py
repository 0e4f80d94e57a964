"""From a source to batches of numpy arrays, with Grain.

The stream depends on the seed and the sample's place in it only: not on the number of workers or processes, and a run
that starts at a later step gets what an uninterrupted one would have got there. An image that cannot be read does not
change that: it is told in the batch as `bad`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from crossvit_jax.preprocess import UnreadableImage, orientation
from train.config import steps_per_epoch
from train.data.sources import DataError, Source
from train.data.workers import in_workers
from train.devices.decoding import decoding_memory
from train.images.transforms import EvalTransform

Sample = dict[str, Any]
Batch = dict[str, np.ndarray]

# In each process: threads overlap reading and decoding, while images are augmented one at a time (see transforms.py).
_READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)
_NEIGHBOURS = 64  # so many unreadable images in a row are not single damaged files any more
_NOT_BAD = np.int32(-1)
_EPOCHS = 2**31  # not for ever: Grain then cannot count batches of one image
_ENDLESS = 2**31 - _NEIGHBOURS  # images of an endless source: their indices are int32


def train_batches(
    source: Source,
    transform: Callable[[Sample, np.random.Generator], Sample],
    *,
    batch_size: int,
    seed: int,
    workers: int,
    start_step: int = 0,
    repeats: int = 1,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.IterDataset:
    """Endless batches of `image` (batch, height, width, channels) as transformed, `label` (batch,) int32, `bad` and
    `tagged`.

    Every `steps_per_epoch` batches (see `train.config`) hold each image at most `repeats` times, in an order of
    that epoch's own. Of an endless source (see `train.data.dense.samples`) no image comes twice: they are taken in its
    own order, and each epoch goes on where the one before ended.

    `bad` (batch,) int32 is -1, or the index in the source of an image that could not be read. In its place is the next
    one that could, with its own label. DataError is raised, here or in a worker, if 64 in a row could not.

    `tagged` (batch,) int8 is 1 for an image with an EXIF orientation that would turn it, 0 for any other, and -1 where
    there is no image.

    Args:
        transform: a picklable function of a sample and its own generator, see `train.images.transforms`. It raises
            UnreadableImage, if at all, before it draws.
        batch_size: over all processes; each gets its part, a whole number. The parts one after the other, in the order
            of the processes, are the batch that a single process would get.
        workers: processes that read and augment; 0: threads of this process.
        start_step: batches to leave out at the beginning, at no cost.
        repeats: copies of an image, each augmented by itself, that follow one another in an epoch of as many fewer
            images (DeiT's repeated augmentation); 1: none.
    """
    if getattr(source, "endless", False):
        order = grain.MapDataset.range(_ENDLESS).seed(seed)
    else:
        order = grain.MapDataset.range(len(source)).seed(seed).shuffle()
        if repeats > 1:
            order = _Repeated(order, repeats)
        order = order[: steps_per_epoch(len(source), batch_size, repeats) * batch_size].repeat(_EPOCHS)
    batches = order.random_map(
        _ForTraining(source, transform)
    ).batch(  # before the processes part, so that no two draw the same
        batch_size // process_count, batch_fn=_stack
    )[process_index::process_count][start_step:]
    return in_workers(batches.to_iter_dataset(_READ_OPTIONS), workers)


def eval_batches(
    source: Source,
    transform: EvalTransform,
    *,
    batch_size: int,
    workers: int,
    rounds: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.IterDataset:
    """Every image once, in order, and so again and again: a round has ceil(images / batch_size) batches everywhere.

    As training batches, `image` in uint8, with `mask` (batch,) float32: 1 for an image; 0 for what fills up the
    last batch and for an image that could not be read, where the transform's `blank` stands.

    Args:
        rounds: how many; none: without end, so that the workers stay alive between two evaluations.
    """
    batches_per_round = -(-len(source) // batch_size)
    batches = (
        grain.MapDataset.range(batches_per_round * batch_size)
        .map(_ForEvaluation(source, transform))
        .batch(batch_size // process_count, batch_fn=_stack)[process_index::process_count]
        .repeat(rounds)
    )
    return in_workers(batches.to_iter_dataset(_READ_OPTIONS), workers)


class _Repeated(grain.MapDataset):
    """Each element of another data set several times in a row."""

    def __init__(self, parent: grain.MapDataset, repeats: int):
        super().__init__(parent)
        self._repeats = repeats

    def __len__(self) -> int:
        return len(self._parent) * self._repeats

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        # right beyond the first epoch too: Grain's indices go on counting there, in the parent as well
        return self._parent[index // self._repeats]


@dataclass(frozen=True)
class _ForTraining:
    """Reads and transforms the image with an index, or the next one that can be read."""

    source: Source
    transform: Callable[[Sample, np.random.Generator], Sample]

    def __call__(self, index: int, rng: np.random.Generator) -> Sample:
        bad = _NOT_BAD
        images = _ENDLESS if getattr(self.source, "endless", False) else len(self.source)
        tries = min(_NEIGHBOURS, len(self.source))
        for neighbour in range(index, index + tries):
            try:
                with decoding_memory().returned():  # when the picture is as small as the model takes it
                    read = self.source[neighbour % images]
                    sample = self.transform(read, rng)
            except UnreadableImage as error:
                bad, last = np.int32(index), error
            else:
                return {**sample, "bad": bad, "tagged": _tagged(read)}
        raise DataError(f"{tries} images in a row cannot be read; the last of them: {last}")


@dataclass(frozen=True)
class _ForEvaluation:
    """Reads and transforms the image with an index, or gives a blank one: if it is unreadable, and beyond the last."""

    source: Source
    transform: EvalTransform

    def __call__(self, index: int) -> Sample:
        bad = _NOT_BAD
        if index < len(self.source):
            try:
                with decoding_memory().returned():
                    read = self.source[index]
                    sample = self.transform(read)
                return {**sample, "mask": np.float32(1), "bad": bad, "tagged": _tagged(read)}
            except UnreadableImage:
                bad = np.int32(index)
        return {**self.transform.blank(), "mask": np.float32(0), "bad": bad, "tagged": np.int8(-1)}


def _tagged(sample: Sample) -> np.int8:
    return np.int8(orientation(sample["image"]) != 1)


def _stack(samples: Sequence[Sample]) -> Batch:
    return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}
