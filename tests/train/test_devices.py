"""The same run on one device and on eight."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

_SCRIPT = """
import dataclasses, sys
import jax
from tests.train.conftest import shrink
from train.config import RECIPES, TrainConfig
from train.job import prepare
from train.loop import train
from train.sharding import make_mesh

data_dir, output = sys.argv[1:]
shrink(dict.__setitem__)
assert jax.device_count() == 8
base = dataclasses.replace(
    RECIPES["digits"], data_dir=data_dir, epochs=1, warmup_epochs=0, batch_size=240, log_every=1,
    mixup=0.8, cutmix=1.0, drop_path=0.1,  # all that is random in the step
)
for count in (1, 8):
    job = prepare(dataclasses.replace(base, output=f"{output}/{count}"))
    train(dataclasses.replace(job, mesh=make_mesh(jax.devices()[:count])))
"""


@pytest.mark.slow
def test_one_and_eight_devices_train_and_evaluate_alike(digits_dir, tmp_path):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    subprocess.run([sys.executable, "-c", _SCRIPT, digits_dir, str(tmp_path)], check=True, env=environment)

    def values(count):
        lines = [json.loads(line) for line in (tmp_path / str(count) / "metrics.jsonl").read_text().splitlines()]
        losses = [line["train/loss"] for line in lines if "train/loss" in line]
        assert len(losses) == 1438 // 240
        return np.array([*losses, lines[-1]["eval/loss"]])

    np.testing.assert_allclose(values(8), values(1), atol=1e-5)
