"""The batches of a run, read and transformed by Grain's threads or workers and brought to the devices ahead of time."""

from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from train.data.batches import eval_batches, train_batches
from train.devices.mesh import batch_sharding
from train.images.transforms import eval_transform, train_transform
from train.job import Job

BATCHES_AHEAD = 2  # already on the devices while a step runs


def open_train_stream(job: Job, *, start_step: int) -> grain.DatasetIterator:
    """Batches for training from the step after `start_step` steps, without end. Close it after use."""
    batches = train_batches(
        job.image_sets.train,
        train_transform(job.config, job.model_config),
        batch_size=job.config.batch_size,
        seed=job.config.seed,
        start_step=start_step,
        repeats=job.config.repeated_aug,
        **_common(job),
    )
    return device_batches(batches, job.mesh)


def open_eval_stream(job: Job) -> grain.DatasetIterator:
    """The held-out images, again and again: `job.eval_steps` batches each time. Close it after use."""
    batches = eval_batches(
        job.image_sets.held_out, eval_transform(job.model_config), batch_size=job.eval_batch_size, **_common(job)
    )
    return device_batches(batches, job.mesh)


def device_batches(batches: grain.IterDataset, mesh: Mesh) -> grain.DatasetIterator:
    """An iterator over batches of numpy arrays that brings them to the devices ahead of time, in a thread.

    `bad`, the places of images that could not be read, also stays on the host as `bad_indices`. It starts at once.
    Close it after use: that ends its thread and the worker processes behind it.
    """
    sharding = batch_sharding(mesh)

    def put_batch(batch: dict[str, np.ndarray]) -> dict[str, Any]:
        arrays = {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}
        return {**arrays, "bad_indices": batch["bad"]}

    buffer = BATCHES_AHEAD - 1  # the thread itself holds another one until there is room
    iterator = iter(grain.experimental.ThreadPrefetchIterDataset(batches.map(put_batch), prefetch_buffer_size=buffer))
    iterator.start_prefetch()
    return iterator


def _common(job: Job) -> dict[str, Any]:
    return {
        "workers": job.config.workers,
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
    }
