"""The batches of a run, read and transformed by Grain's threads or workers and brought to the devices ahead of time."""

from typing import Any

import grain
import jax

from train.data.batches import eval_batches, train_batches
from train.data.prefetch import device_batches
from train.images.transforms import eval_transform, train_transform
from train.job import Job


def open_train_stream(job: Job, *, start_step: int) -> grain.DatasetIterator:
    """Batches for training from the step after `start_step` steps, without end. Close it after use."""
    batches = train_batches(
        job.image_sets.train,
        train_transform(job.config, job.model_config),
        batch_size=job.config.batch_size,
        seed=job.config.seed,
        start_step=start_step,
        repeats=job.config.repeated_aug,
        **_common(job),
    )
    return device_batches(batches, job.mesh)


def open_eval_stream(job: Job) -> grain.DatasetIterator:
    """The held-out images, again and again: `job.eval_steps` batches each time. Close it after use."""
    batches = eval_batches(
        job.image_sets.held_out, eval_transform(job.model_config), batch_size=job.eval_batch_size, **_common(job)
    )
    return device_batches(batches, job.mesh)


def _common(job: Job) -> dict[str, Any]:
    return {
        "workers": job.config.workers,
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
    }
