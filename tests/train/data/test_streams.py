"""Batches are brought to the devices ahead of time, and no further than is planned for."""

import time
from contextlib import closing

import grain
import jax
import numpy as np

from train.data.streams import BATCHES_AHEAD, device_batches
from train.devices.mesh import make_mesh


def test_no_more_batches_lie_on_the_devices_than_the_plan_of_memory_counts(monkeypatch):
    put, place = [], jax.make_array_from_process_local_data

    def placed(sharding, array):
        put.append(array)
        return place(sharding, array)

    monkeypatch.setattr(jax, "make_array_from_process_local_data", placed)
    batches = grain.MapDataset.range(20).map(lambda n: {"bad": np.array([n], np.int32)}).to_iter_dataset()
    with closing(device_batches(batches, make_mesh(devices=jax.devices()[:1]))) as stream:
        for taken in range(8):
            assert next(stream)["bad_indices"] == taken
            time.sleep(0.02)  # for the thread to go too far, if it would
            assert len(put) <= taken + 1 + BATCHES_AHEAD
