"""Batches on their way to the devices: brought there ahead of time, by a thread of their own."""

from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from train.devices.mesh import batch_sharding

BATCHES_AHEAD = 2  # already on the devices while a step runs


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
