"""The same run on one device, on eight in two meshes, and in two processes."""

import json
import signal
import socket

import numpy as np
import pytest

from tests.train.runner import Run
from train.run.metrics_log import read_metrics

# 20 steps, with all that is random in them
_FLAGS = ["--recipe=digits", "--epochs=4", "--batch-size=40", "--log-every=1", "--checkpoint-every=7"]
_FLAGS += ["--mixup=0.8", "--cutmix=1", "--drop-path=0.1", "--dropout=0.1", "--ema-decay=0.9", "--mix-group=5"]


def _start(folder, few_digits_dir, *flags, devices, process=0):
    log = folder.with_name(f"{folder.name}-{process}.log")
    log.unlink(missing_ok=True)
    return Run([f"--data-dir={few_digits_dir}", f"--output={folder}", *_FLAGS, *flags], log, devices=devices)


def _end(*runs, status=0):
    """The output of processes that must end so."""
    statuses = [run.wait(1200) for run in runs]
    outputs = [run.output for run in runs]
    assert statuses == [status] * len(runs), "\n".join(outputs)
    return outputs


def _values(folder):
    lines = read_metrics(folder)
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == 20
    return np.array(losses + [line[name] for line in lines for name in ("eval/loss", "eval/ema_loss") if name in line])


@pytest.fixture(scope="module")
def one_device(few_digits_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("devices") / "1"
    _end(_start(folder, few_digits_dir, devices=1))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=8", "data=2,fsdp=4"])
def test_eight_devices_train_and_evaluate_as_one_does(one_device, few_digits_dir, tmp_path, mesh):
    (output,) = _end(_start(tmp_path / "8", few_digits_dir, f"--mesh={mesh}", devices=8))
    assert mesh.replace("=", " ").replace(",", ", ") in output
    np.testing.assert_allclose(_values(tmp_path / "8"), _values(one_device), atol=1e-5)


def _start_two(folder, few_digits_dir, *flags):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    return [
        _start(
            folder,
            few_digits_dir,
            f"--coordinator=localhost:{port}",
            "--num-processes=2",
            f"--process-id={process}",
            *flags,
            devices=2,
            process=process,
        )
        for process in range(2)
    ]


@pytest.mark.slow
def test_two_processes_train_as_one_does_stop_together_and_go_on(one_device, few_digits_dir, tmp_path):
    folder = tmp_path / "2"
    first, second = _start_two(folder, few_digits_dir, "--mesh=fsdp=2")
    assert first.wait_for(lambda: (folder / "metrics.jsonl").exists() and len(read_metrics(folder)) >= 3), first.output
    second.send(signal.SIGTERM)  # one is told, both save and end
    _end(first, second, status=143)
    steps = sorted(int(path.name) for path in (folder / "checkpoints").iterdir())
    assert 0 < steps[-1] < 20

    outputs = _end(*_start_two(folder, few_digits_dir, "--mesh=data=4"))  # on another mesh
    assert f"continued after step {steps[-1]} of 20" in outputs[0]
    assert "held-out top-1" in outputs[0]
    assert "epoch" not in outputs[1]  # only one speaks
    np.testing.assert_allclose(_values(folder), _values(one_device), atol=1e-5)
    weights = json.loads((folder / "config.json").read_text())["model"]
    assert weights["config"]["num_classes"] == 10
    assert (folder / "weights.safetensors").exists()
