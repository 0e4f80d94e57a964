"""Slices of TPUs that are not there, as devices to compile for."""

import importlib.util
import os
import re

from convert.errors import MissingExtra, SettingsError
from crossvit_jax.extras import needs

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
