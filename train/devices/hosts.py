"""Several processes, on one machine or many, as one run."""

import contextlib
import socket
import time

import jax

from convert.errors import SettingsError
from train.config import TrainConfig

_BETWEEN_TRIES_S = 0.5
_HEARTBEAT_S = 45  # after which a host that says nothing is lost, and the others end; jax waits 100


def join_processes(config: TrainConfig) -> None:
    """Join the other processes of the run, if there are any. To be called before anything touches a device.

    With --coordinator as told; otherwise as jax finds them: SLURM, Open MPI, GKE and Cloud TPU. Where it finds none,
    the run has one process; so it has in a program that used its devices before. Raises SettingsError if the others
    cannot be reached within `join_timeout` seconds.
    """
    if jax.distributed.is_initialized():
        return
    if config.coordinator is not None and config.process_id != 0:
        _wait_for(config.coordinator, config.join_timeout)
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.num_processes,
            config.process_id,
            initialization_timeout=config.join_timeout,
            heartbeat_timeout_seconds=_HEARTBEAT_S,
        )
    except ValueError as error:
        if config.coordinator is not None:
            raise SettingsError(f"cannot join the other processes: {error}") from error
        # jax found no cluster
    except RuntimeError as error:
        if config.coordinator is None and "before" in str(error):
            return  # jax: "must be called before any JAX calls that might initialise the XLA backend"
        where = config.coordinator or "the coordinator that jax found"
        raise SettingsError(f"cannot join the other processes at {where}: {str(error).splitlines()[0]}") from error


def _wait_for(address: str, seconds: float) -> None:
    """Until something listens at an address: where nothing does, jax aborts its process and prints a page."""
    host, _, port = address.rpartition(":")
    end = time.monotonic() + seconds
    while True:
        left = end - time.monotonic()
        try:
            with contextlib.closing(socket.create_connection((host.strip("[]"), int(port)), max(left, 0.1))):
                return
        except (OSError, UnicodeError) as error:  # the latter of a name that cannot be one
            reason = getattr(error, "strerror", None) or str(error)
        if time.monotonic() + _BETWEEN_TRIES_S > end:
            raise SettingsError(
                f"cannot join the other processes: nothing answers at {address} within {seconds:g} s ({reason}); "
                "--join-timeout waits longer"
            )
        time.sleep(_BETWEEN_TRIES_S)


def is_main() -> bool:
    """Whether this process speaks and writes for all."""
    return jax.process_index() == 0
