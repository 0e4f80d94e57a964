"""The batches of a run, read and transformed by Grain's threads or workers and brought to the devices ahead of time."""

from collections.abc import Callable
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from train.config import TrainConfig
from train.data.batches import Sample, eval_batches, train_batches
from train.data.sources import Source
from train.devices.mesh import batch_sharding
from train.images.transforms import EvalTransform

BATCHES_AHEAD = 2  # already on the devices while a step runs
_ON_HOST = ("tagged", "size")  # what the devices do not get


def open_train_stream(
    config: TrainConfig,
    images: Source,
    transform: Callable[[Sample, np.random.Generator], Sample],
    mesh: Mesh,
    *,
    start_step: int,
) -> grain.DatasetIterator:
    """Batches for training from the step after `start_step` steps, without end. Close it after use.

    Args:
        transform: see `train.data.batches.train_batches`.
    """
    batches = train_batches(
        images,
        transform,
        batch_size=config.batch_size,
        seed=config.seed,
        start_step=start_step,
        repeats=config.repeated_aug,
        **_everywhere(config),
    )
    return device_batches(batches, mesh)


def open_eval_stream(
    config: TrainConfig, images: Source, transform: EvalTransform, mesh: Mesh, *, batch_size: int
) -> grain.DatasetIterator:
    """All images in order, again and again, the last batch of each round filled up. Close it after use.

    Args:
        transform: see `train.data.batches.eval_batches`.
        batch_size: over all devices and processes.
    """
    return device_batches(eval_batches(images, transform, batch_size=batch_size, **_everywhere(config)), mesh)


def device_batches(batches: grain.IterDataset, mesh: Mesh) -> grain.DatasetIterator:
    """An iterator over batches of numpy arrays that brings them to the devices ahead of time, in a thread.

    `bad`, the places of images that could not be read, also stays on the host as `bad_indices`, and `tagged` there
    only. It starts at once. Close it after use: that ends its thread and the worker processes behind it.
    """
    sharding = batch_sharding(mesh)

    def put_batch(batch: dict[str, np.ndarray]) -> dict[str, Any]:
        on_host = {"bad_indices": batch["bad"], **{name: batch[name] for name in _ON_HOST if name in batch}}
        arrays = {name: array for name, array in batch.items() if name not in _ON_HOST}
        return on_host | {name: jax.make_array_from_process_local_data(sharding, a) for name, a in arrays.items()}

    buffer = BATCHES_AHEAD - 1  # the thread itself holds another one until there is room
    iterator = iter(grain.experimental.ThreadPrefetchIterDataset(batches.map(put_batch), prefetch_buffer_size=buffer))
    iterator.start_prefetch()
    return iterator


def _everywhere(config: TrainConfig) -> dict[str, Any]:
    return {"workers": config.workers, "process_index": jax.process_index(), "process_count": jax.process_count()}
