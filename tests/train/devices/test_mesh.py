"""The mesh that is asked for, and what lies where on it."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from convert.errors import SettingsError
from train.config import TrainConfig
from train.devices.mesh import AXES, check_divides, make_mesh, mesh_shape, state_shardings


@pytest.mark.parametrize(
    ("text", "shape"),
    [(None, (8, 1)), ("data=8", (8, 1)), ("fsdp=8", (1, 8)), ("data=2,fsdp=4", (2, 4)), ("fsdp=2, data=4", (4, 2))],
)
def test_an_axis_left_out_gets_what_the_other_leaves(text, shape):
    assert mesh_shape(text, 8) == shape


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data=3", "mesh data=3 takes 6 devices; there are 8"),
        ("data=2,fsdp=2", "takes 4 devices; there are 8"),
        ("fsdp=16", "takes 16 devices; there are 8"),
        ("model=2", "must look like data=4,fsdp=2; got 'model=2'"),
        ("data=0", "must look like"),
        ("data=2,data=4", "must look like"),
        ("8", "must look like"),
    ],
)
def test_a_mesh_that_is_not_the_devices_is_a_clear_error(text, message):
    with pytest.raises(SettingsError, match=message):
        mesh_shape(text, 8)


def test_a_batch_that_cannot_be_divided_is_a_clear_error():
    mesh = jax.sharding.AbstractMesh((2, 4), AXES)
    check_divides(TrainConfig(batch_size=16, grad_accum=2), mesh)
    with pytest.raises(SettingsError, match=r"batch_size 12 cannot be divided among 8 devices$"):
        check_divides(TrainConfig(batch_size=12), mesh)
    with pytest.raises(SettingsError, match=r"batch_size 24 cannot be divided among 8 devices in 2 parts$"):
        check_divides(TrainConfig(batch_size=24, grad_accum=2), mesh)


def test_no_usable_device_is_one_line(monkeypatch):
    def fail():
        raise RuntimeError("Unable to initialize backend 'cuda'\nsecond line")

    monkeypatch.setattr(jax, "devices", fail)
    with pytest.raises(SettingsError, match=r"^jax cannot start: Unable to initialize backend 'cuda'$"):
        make_mesh()


def test_large_arrays_are_cut_along_their_largest_axis_that_divides_and_others_are_whole():
    mesh = jax.sharding.AbstractMesh((2, 4), AXES)
    shapes = {"a": (64, 128), "b": (128, 64), "c": (97, 64, 2), "d": (97, 99), "bias": (64,), "step": ()}
    tree = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    specs = {name: sharding.spec for name, sharding in state_shardings(tree, mesh).items()}
    assert specs == {
        "a": PartitionSpec(None, "fsdp"),
        "b": PartitionSpec("fsdp"),
        "c": PartitionSpec(None, "fsdp"),
        "d": PartitionSpec(),
        "bias": PartitionSpec(),
        "step": PartitionSpec(),
    }
