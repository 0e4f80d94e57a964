"""What can be done without the packages that read images and write logs, and imports in several threads."""

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
    """A machine for measuring models may have no more than jax, flax, optax and torch."""
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_threads_that_begin_to_read_at_once_do_not_meet_in_timms_circle_of_imports():
    program = """
import io, threading
import numpy as np
from PIL import Image
from train.config import RECIPES
from train.transforms import EvalTransform, TrainTransform

file = io.BytesIO()
Image.new("RGB", (40, 30)).save(file, "PNG")
sample = {"image": file.getvalue(), "label": 1, "name": "black"}
train, evaluate = TrainTransform(RECIPES["imagenet"], (24, 24)), EvalTransform((24, 24), 0.875)
together, read = threading.Barrier(4), []

def start(transform, *rng):
    together.wait()
    read.append(transform(sample, *rng)["image"].shape)

calls = [(train, np.random.default_rng(0)), (evaluate,)] * 2
threads = [threading.Thread(target=start, args=call) for call in calls]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert read == [(24, 24, 3)] * 4, read
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
