"""Slices of TPUs that are not there, as devices to compile for; and how long a program would take on them."""

import importlib.util
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from convert.errors import MissingExtra, SettingsError
from crossvit_jax.extras import needs

if TYPE_CHECKING:
    from train.cost.hlo import Traffic

# Without a TPU, libtpu looks for one, complains at length and leaves log files in /tmp. Told all that, it is silent.
# It would also refuse to be loaded by a second process, because two cannot share a TPU; but nothing is run on one here.
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
}


@dataclass(frozen=True)
class Chip:
    """What Google publishes of a chip (Cloud TPU documentation, "TPU versions"), per second."""

    peak: float  # FLOPs in bfloat16
    flops_per_cycle: int  # of all matrix units: 128 x 128 multiply-adds each
    links: float  # bytes, of all inter-chip links together
    axes: int  # of the torus that the links make

    @property
    def clock(self) -> float:
        """Cycles per second: those at which the matrix units reach the peak."""
        return self.peak / self.flops_per_cycle

    @property
    def ring(self) -> float:
        """Bytes per second that a chip sends on a ring along one axis, both ways together."""
        return self.links / self.axes


CHIPS = {
    "TPU v4": Chip(275e12, 8 * 2 * 128**2, 300e9, 3),
    "TPU v5 lite": Chip(197e12, 4 * 2 * 128**2, 200e9, 2),
    "TPU v5": Chip(459e12, 8 * 2 * 128**2, 600e9, 3),
}


@dataclass(frozen=True)
class Estimate:
    """Seconds of a program on a slice, for comparing slices: nothing is measured.

    It takes between the longer of the two, if all communication is hidden behind computing, and their sum, if none is.
    """

    compute: float  # the compiler's estimate of cycles, summed as if nothing overlapped
    communication: float  # what leaves a chip on rings along one axis of the slice; latency is left out

    @property
    def shortest(self) -> float:
        return max(self.compute, self.communication)

    @property
    def longest(self) -> float:
        return self.compute + self.communication


def estimate(device_kind: str, cycles: int | None, traffic: "Mapping[str, Traffic]") -> Estimate | None:
    """What a chip's cycles and traffic come to; None where no cycles are known, or no figures of the chip."""
    chip = CHIPS.get(device_kind)
    if chip is None or cycles is None:
        return None
    return Estimate(cycles / chip.clock, sum(kind.sent for kind in traffic.values()) / chip.ring)


def prepare_environment() -> None:
    """Let jax compile for TPUs on a machine without one. To be called before jax is imported.

    What the environment says already stays. Raises MissingExtra if libtpu, which has the compiler, is not installed.
    """
    found = importlib.util.find_spec("libtpu")
    if found is None or found.origin is None:
        raise MissingExtra(needs("--topology", ["libtpu, the TPU's compiler"], "tpu"))
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def slice_devices(topology: str) -> list:
    """The devices of a slice such as `v5e:4x4` or `v5p:4x4x4`, one for each chip (from v4 to v6e).

    Raises SettingsError if libtpu knows no such slice.
    """
    import jax
    from jax.experimental.topologies import get_topology_desc

    # both cores of a v4 chip as one device, as jax has them on a machine with such chips
    options = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    if part := re.fullmatch(r"v\w+:(1x1|1x2|2x1)", topology):  # less than the four chips of a host
        options["chips_per_host_bounds"] = [*map(int, part[1].split("x")), 1]
    try:
        return get_topology_desc(topology, platform="tpu", **options).devices
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise SettingsError(f"no topology {topology!r}, write it like v5e:4x4 or v5p:4x4x4 ({reason})") from error
