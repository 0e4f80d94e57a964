"""The devices of a run as a mesh, and how state and batches lie on it: data-parallel, parameters on every device."""

from collections.abc import Iterator

import grain
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

_BATCHES_AHEAD = 2  # batches already on the devices while a step runs


def make_mesh() -> Mesh:
    """All devices on one axis, `data`."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis cut into one piece per device."""
    return NamedSharding(mesh, PartitionSpec("data"))


def device_batches(batches: grain.IterDataset, mesh: Mesh) -> Iterator[dict[str, jax.Array]]:
    """An iterator over batches of numpy arrays that brings them to the devices ahead of time, in a thread.

    Close it after use: that ends its thread and the worker processes behind it.
    """
    sharding = batch_sharding(mesh)

    def put(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}

    return iter(grain.experimental.ThreadPrefetchIterDataset(batches.map(put), prefetch_buffer_size=_BATCHES_AHEAD))
