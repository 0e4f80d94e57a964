"""What can be done without the packages that read images and write logs."""

import subprocess
import sys

_PROGRAM = """
import sys

for name in ("array_record", "grain", "simplejpeg", "tensorboardX", "tensorflow_datasets"):
    sys.modules[name] = None  # as if it were not installed

import benchmarks.flax_side
import train.augment
"""


def test_steps_and_augmentation_on_a_device_need_nothing_that_reads_data():
    """A machine that is lent for measuring the model has no more than jax, flax, optax and torch."""
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
