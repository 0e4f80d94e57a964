"""Several processes, on one machine or many, as one run."""

import jax

from convert.errors import SettingsError
from train.config import TrainConfig

_HEARTBEAT_S = 45  # after which a host that says nothing is lost, and the others end; jax waits 100


def join_processes(config: TrainConfig) -> None:
    """Join the other processes of the run, if there are any. To be called before anything touches a device.

    With --coordinator as told; otherwise as jax finds them: SLURM, Open MPI, GKE and Cloud TPU. Where it finds none,
    the run has one process; so it has in a program that used its devices before. Raises SettingsError if the others
    cannot be reached.
    """
    if jax.distributed.is_initialized():
        return
    try:
        jax.distributed.initialize(
            config.coordinator, config.num_processes, config.process_id, heartbeat_timeout_seconds=_HEARTBEAT_S
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


def is_main() -> bool:
    """Whether this process speaks and writes for all."""
    return jax.process_index() == 0
