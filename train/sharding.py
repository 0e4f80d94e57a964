"""The devices of a run as a mesh, and how state and batches lie on it: data-parallel, parameters on every device."""

from collections.abc import Sequence

import grain
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

_BATCHES_AHEAD = 2  # batches already on the devices while a step runs


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The devices (none: all of them) on one axis, `data`."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis cut into one piece per device."""
    return NamedSharding(mesh, PartitionSpec("data"))


def device_batches(batches: grain.IterDataset, mesh: Mesh) -> grain.DatasetIterator:
    """An iterator over batches of numpy arrays that brings them to the devices ahead of time, in a thread.

    It starts at once. Close it after use: that ends its thread and the worker processes behind it.
    """
    sharding = batch_sharding(mesh)

    def put(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}

    ahead = grain.experimental.ThreadPrefetchIterDataset(batches.map(put), prefetch_buffer_size=_BATCHES_AHEAD)
    iterator = iter(ahead)
    iterator.start_prefetch()
    return iterator
