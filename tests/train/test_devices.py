"""The same run on one device, on eight in two meshes, and in two processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.train.runner import QUICK_COMPILATION
from train.metrics import read_metrics

_SCRIPT = """
import sys
from tests.train.conftest import shrink
from train.main import main

shrink(dict.__setitem__)
sys.exit(main(sys.argv[1:]))
"""
# 20 steps, with all that is random in them
_FLAGS = ["--recipe=digits", "--epochs=4", "--batch-size=256", "--log-every=1", "--checkpoint-every=7"]
_FLAGS += ["--mixup=0.8", "--cutmix=1", "--drop-path=0.1", "--dropout=0.1", "--ema-decay=0.9"]


def _start(folder, digits_dir, cache, *flags, devices):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{QUICK_COMPILATION} --xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
    }
    command = [sys.executable, "-c", _SCRIPT, f"--data-dir={digits_dir}", f"--output={folder}", *_FLAGS, *flags]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _end(*processes):
    """The output of processes that must end well."""
    outputs = [process.communicate(timeout=1200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(outputs)
    return outputs


def _values(folder):
    lines = read_metrics(folder)
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == 20
    return np.array(losses + [line[name] for line in lines for name in ("eval/loss", "eval/ema_loss") if name in line])


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def one_device(digits_dir, cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("devices") / "1"
    _end(_start(folder, digits_dir, cache, devices=1))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=8", "data=2,fsdp=4"])
def test_eight_devices_train_and_evaluate_as_one_does(one_device, digits_dir, cache, tmp_path, mesh):
    (output,) = _end(_start(tmp_path / "8", digits_dir, cache, f"--mesh={mesh}", devices=8))
    assert mesh.replace("=", " ").replace(",", ", ") in output
    np.testing.assert_allclose(_values(tmp_path / "8"), _values(one_device), atol=1e-5)


def _start_two(folder, digits_dir, cache, *flags):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    return [
        _start(
            folder,
            digits_dir,
            cache,
            f"--coordinator=localhost:{port}",
            "--num-processes=2",
            f"--process-id={process}",
            *flags,
            devices=2,
        )
        for process in range(2)
    ]


@pytest.mark.slow
def test_two_processes_train_as_one_does_stop_together_and_go_on(one_device, digits_dir, cache, tmp_path):
    folder = tmp_path / "2"
    processes = _start_two(folder, digits_dir, cache, "--mesh=fsdp=2")
    end = time.monotonic() + 900
    while not (folder / "metrics.jsonl").exists() or len(read_metrics(folder)) < 3:
        assert time.monotonic() < end
        assert [process.poll() for process in processes] == [None, None], processes[0].communicate()[0]
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)  # one is told, both save and end
    outputs = [process.communicate(timeout=1200)[0] for process in processes]
    assert [process.returncode for process in processes] == [143, 143], "\n".join(outputs)
    steps = sorted(int(path.name) for path in (folder / "checkpoints").iterdir())
    assert 0 < steps[-1] < 20

    outputs = _end(*_start_two(folder, digits_dir, cache, "--mesh=data=4"))  # on another mesh
    assert f"continued after step {steps[-1]} of 20" in outputs[0]
    assert "held-out top-1" in outputs[0]
    assert "epoch" not in outputs[1]  # only one speaks
    np.testing.assert_allclose(_values(folder), _values(one_device), atol=1e-5)
    weights = json.loads((folder / "config.json").read_text())["model"]
    assert weights["config"]["num_classes"] == 10
    assert (folder / "weights.safetensors").exists()
