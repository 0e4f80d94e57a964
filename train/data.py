"""From a source to batches of numpy arrays, with Grain.

The stream depends on the seed and the sample's place in it only: not on the number of workers, and a run that starts
at a later step gets what an uninterrupted one would have got there.
"""

from collections.abc import Callable, Sequence
from typing import Any

import grain
import jax
import numpy as np
from absl import flags

from train.sources import Source
from train.transforms import one_torch_thread

Sample = dict[str, Any]

# In each process: threads overlap reading and decoding, while images are augmented one at a time (see transforms.py).
_READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Whole batches in the training images; the rest is left out, another rest in each epoch."""
    return images // batch_size


def train_batches(
    source: Source,
    transform: Callable[[Sample, np.random.Generator], Sample],
    *,
    batch_size: int,
    seed: int,
    workers: int,
    start_step: int = 0,
) -> grain.IterDataset:
    """Endless batches of `image` (batch, height, width, channels) float32 and `label` (batch,) int32.

    Every `steps_per_epoch` batches hold each image at most once, in an order of that epoch's own.

    Args:
        transform: a picklable function of a sample and its own generator, see `train.transforms`.
        workers: processes that read and augment; 0: threads of this process.
        start_step: batches to leave out at the beginning, at no cost.
    """
    batches = (
        grain.MapDataset.source(source)
        .seed(seed)
        .shuffle()[: steps_per_epoch(len(source), batch_size) * batch_size]
        .repeat()
        .random_map(transform)
        .batch(batch_size, batch_fn=_stack)[start_step:]
    )
    return _in_workers(batches, workers)


def eval_batches(
    source: Source, transform: Callable[[Sample], Sample], *, batch_size: int, workers: int
) -> grain.IterDataset:
    """Every image once, in order, again and again: each round has ceil(images / batch_size) batches.

    Like training batches, with `mask` (batch,) float32: 1 for an image, 0 for what fills up the last batch. They repeat
    so that the workers stay alive between two evaluations.
    """
    batches = (
        grain.MapDataset.source(source)
        .map(transform)
        .batch(batch_size, batch_fn=lambda samples: pad_batch(_stack(samples), batch_size))
        .repeat()
    )
    return _in_workers(batches, workers)


def pad_batch(batch: dict[str, np.ndarray], batch_size: int) -> dict[str, np.ndarray]:
    """A batch filled up with zeros, and a `mask` that tells its images from the filling."""
    count = len(batch["label"])
    padded = {
        name: np.pad(array, [(0, batch_size - count)] + [(0, 0)] * (array.ndim - 1)) for name, array in batch.items()
    }
    return {**padded, "mask": (np.arange(batch_size) < count).astype(np.float32)}


def _stack(samples: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}


def _in_workers(batches: grain.MapDataset, workers: int) -> grain.IterDataset:
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain's workers ask absl, which does not run this program
    return batches.to_iter_dataset(_READ_OPTIONS).mp_prefetch(
        grain.MultiprocessingOptions(num_workers=workers), worker_init_fn=_init_worker
    )


def _init_worker(index: int, count: int) -> None:
    one_torch_thread()
    # the accelerators belong to the main process
    jax.config.update("jax_platforms", "cpu")
