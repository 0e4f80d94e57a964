"""The devices of a run as a mesh with the axes `data` and `fsdp`, and how state and batches lie on it.

Batches are cut over both axes. Parameters and what belongs to them (optimiser state, moving average) are cut over
`fsdp` and repeated along `data`.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from convert.errors import SettingsError, one_line
from train.config import TrainConfig

AXES = ("data", "fsdp")
_SMALLEST_CUT = 2**12  # arrays of fewer elements are not worth the communication


def mesh_shape(text: str | None, devices: int) -> tuple[int, int]:
    """`"data=4,fsdp=2"` as numbers of devices. An axis left out gets what the other leaves; none: all on `data`.

    Raises SettingsError for anything else, or if the axes do not multiply to the number of devices.
    """
    sizes: dict[str, int] = {}
    for part in (text or "fsdp=1").split(","):
        match = re.fullmatch(r"(data|fsdp)=([1-9][0-9]*)", part.strip(), re.ASCII)
        if not match or match[1] in sizes:
            raise SettingsError(f"mesh must look like data=4,fsdp=2; got {text!r}")
        sizes[match[1]] = int(match[2])
    for axis, other in (AXES, AXES[::-1]):
        sizes.setdefault(axis, max(1, devices // sizes.get(other, 1)))
    if sizes["data"] * sizes["fsdp"] != devices:
        raise SettingsError(f"mesh {text} takes {sizes['data'] * sizes['fsdp']} devices; there are {devices}")
    return sizes["data"], sizes["fsdp"]


def make_mesh(shape: str | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The devices (none: all of them) in the shape that `mesh_shape` understands.

    Raises SettingsError as it does, and if jax finds no usable device.
    """
    try:
        devices = jax.devices() if devices is None else devices
    except RuntimeError as error:
        raise SettingsError(f"jax cannot start: {one_line(error)}") from error
    sizes = mesh_shape(shape, len(devices))
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def check_divides(config: TrainConfig, mesh: Mesh) -> None:
    """Raises SettingsError if the parts of a batch cannot be divided among the devices of a mesh."""
    if config.batch_size % (mesh.size * config.grad_accum):
        parts = f" in {config.grad_accum} parts" if config.grad_accum > 1 else ""
        raise SettingsError(f"batch_size {config.batch_size} cannot be divided among {mesh.size} devices{parts}")


def default_precision(mesh: Mesh) -> str:
    """The arithmetic where none was asked for: bfloat16 on accelerators that have it, float16 on those that have not,
    float32 on CPUs."""
    if mesh.devices.flat[0].platform == "cpu":
        return "float32"
    return "bfloat16" if has_bfloat16(mesh) else "float16"


def has_bfloat16(mesh: Mesh) -> bool:
    """Whether no device computes bfloat16 in float32 only, as NVIDIA GPUs before compute capability 8.0 do."""
    told = (re.match(r"(\d+)\.", str(getattr(device, "compute_capability", ""))) for device in mesh.devices.flat)
    return all(match is None or int(match[1]) >= 8 for match in told)


def precision_note(precision: str, mesh: Mesh) -> list[str]:
    """What a user of NVIDIA GPUs without bfloat16 should know of the arithmetic."""
    if has_bfloat16(mesh):
        return []
    kind = mesh.devices.flat[0].device_kind
    if precision == "bfloat16":
        return [f"{kind} has no bfloat16, and computes it in float32, slowly: choose precision float16"]
    return [f"{kind} has no bfloat16: this is float16"] if precision == "float16" else []


def default_mix_group(config: TrainConfig, mesh: Mesh) -> int:
    """The images that a device gets at a time: its share of a part of a batch."""
    return config.batch_size // (mesh.size * config.grad_accum)


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis cut into one piece per device."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def state_shardings(tree: Any, mesh: Mesh) -> Any:
    """How each array of a tree of parameters, or of a whole training state, lies on the devices: by its shape alone.

    Cut along the largest axis that `fsdp` divides; arrays that are small, or have no such axis, are replicated.
    """
    pieces = mesh.shape["fsdp"]

    def sharding(leaf: Any) -> NamedSharding:
        fitting = [axis for axis, size in enumerate(leaf.shape) if size % pieces == 0]
        if pieces == 1 or not fitting or np.prod(leaf.shape) < _SMALLEST_CUT:
            return replicated(mesh)
        cut = max(fitting, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*("fsdp" if axis == cut else None for axis in range(cut + 1))))

    return jax.tree.map(sharding, tree)


def put(tree: Any, shardings: Any) -> Any:
    """A tree of arrays, those of the host the same in every process, as arrays on the devices of all processes."""

    def place(leaf: np.ndarray | jax.Array, sharding: NamedSharding) -> jax.Array:
        if isinstance(leaf, jax.Array):
            return jax.device_put(leaf, sharding)
        return jax.make_array_from_callback(np.shape(leaf), sharding, lambda index: np.asarray(leaf[index]))

    return jax.tree.map(place, tree, shardings)


def fetch(tree: Any, mesh: Mesh) -> Any:
    """A tree of arrays on the devices of all processes as whole numpy arrays, in every process."""
    if jax.tree.leaves(tree)[0].is_fully_addressable:
        return jax.device_get(tree)
    return jax.device_get(jax.jit(lambda x: x, out_shardings=replicated(mesh))(tree))
