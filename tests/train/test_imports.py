"""What can be done without the packages that read images and write logs, and imports in several threads."""

import subprocess
import sys

_PROGRAM = """
import sys

for name in ("array_record", "grain", "simplejpeg", "tensorboardX", "tensorflow_datasets"):
    sys.modules[name] = None  # as if it were not installed

import benchmarks.sides.flax
import train.images.augment
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
from train.recipes import RECIPES
from train.images.transforms import TrainTransform

file = io.BytesIO()
Image.new("RGB", (40, 30)).save(file, "PNG")
sample = {"image": file.getvalue(), "label": 1, "name": "black"}
train, light = (TrainTransform(RECIPES[name], (24, 24)) for name in ("imagenet", "digits"))
together, read = threading.Barrier(4), []

def start(transform):
    together.wait()
    read.append(transform(sample, np.random.default_rng(0))["image"].shape)

threads = [threading.Thread(target=start, args=[transform]) for transform in (train, light) * 2]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert read == [(24, 24, 3)] * 4, read
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_digits_are_read_without_what_takes_seconds_to_import():
    program = """
import sys

for name in ("numba", "sklearn.datasets", "tensorflow_datasets", "timm", "torch"):
    sys.modules[name] = None  # as if it were not installed

import numpy as np
import train.loop
from train.recipes import RECIPES
from train.data.datasets import open_digits
from train.images.transforms import eval_transform, train_transform

config = RECIPES["digits"]
model = config.model_config(10)
sets = open_digits(None)
print(train_transform(config, model)(sets.train[0], np.random.default_rng(0))["image"].shape)
print(eval_transform(model)(sets.held_out[0])["image"].shape)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(48, 48, 3)\n" * 2
