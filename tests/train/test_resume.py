"""Nothing is lost: whatever ends a run, it goes on as if nothing had happened, or says clearly why it does not."""

import json
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from convert import load_weights
from convert.errors import SettingsError
from tests.train.runner import Run
from train.job import augment_on
from train.main import main
from train.recipes import RECIPES
from train.run.folder import Claim, check_same_run
from train.run.metrics_log import read_metrics

_EPOCHS, _STEPS_PER_EPOCH = 4, 14
_STEPS = _EPOCHS * _STEPS_PER_EPOCH
_BEFORE_LAST = 54  # the last checkpoint within an epoch
# everything random, everything stateful: mixing, stochastic depth, the average of the weights, lines within an epoch
_FLAGS = [
    "--recipe=digits",
    "--batch-size=16",
    f"--epochs={_EPOCHS}",
    "--log-every=3",
    "--checkpoint-every=9",
    "--mixup=0.8",
]
_FLAGS += ["--cutmix=1", "--drop-path=0.1", "--dropout=0.1", "--ema-decay=0.9", "--auto-augment=rand-m9-mstd0.5-inc1"]


@pytest.fixture(scope="module")
def start(few_digits_dir, tmp_path_factory):
    """Starts the run in a folder."""
    logs = tmp_path_factory.mktemp("logs")

    def _start(folder, *flags, **kwargs):
        log = logs / f"{folder.parent.name}-{folder.name}-{time.monotonic_ns()}"
        return Run([f"--data-dir={few_digits_dir}", f"--output={folder}", *_FLAGS, *flags], log, **kwargs)

    return _start


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory):
    """The folder of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    run = start(folder)
    assert run.wait() == 0, run.output
    return folder


def _steps(folder):
    """The steps of whole checkpoints."""
    try:
        return sorted(int(entry) for entry in os.listdir(folder / "checkpoints") if entry.isdigit())
    except FileNotFoundError:
        return []


def _logged(folder):
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _assert_same(folder, other):
    assert (folder / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    for name in ("weights.safetensors", "weights-ema.safetensors", "weights-best.safetensors"):
        ours, theirs = load_file(folder / name), load_file(other / name)
        assert ours.keys() == theirs.keys()
        for key in ours:
            np.testing.assert_array_equal(ours[key], theirs[key])


def test_a_run_keeps_the_last_two_checkpoints_and_the_best_and_each_can_be_converted(uninterrupted, small_variant):
    evaluations = [line for line in read_metrics(uninterrupted) if "eval/top1" in line]
    assert [line["step"] for line in evaluations] == [_STEPS_PER_EPOCH * epoch for epoch in range(1, _EPOCHS + 1)]
    best = max(evaluations, key=lambda line: (max(line["eval/ema_top1"], line["eval/top1"]), -line["step"]))["step"]
    assert _steps(uninterrupted) == sorted({best, _BEFORE_LAST, _STEPS})
    weights, last = load_weights(uninterrupted / "checkpoints"), load_file(uninterrupted / "weights.safetensors")
    assert weights.class_names == tuple("0123456789")
    of_best = load_weights(uninterrupted)  # the folder stands for the best evaluation
    assert of_best.class_names == weights.class_names
    assert f"after epoch {best // _STEPS_PER_EPOCH}, held-out top-1 " in of_best.notes[0]
    for name, tensor in weights.tensors.items():
        np.testing.assert_array_equal(tensor, last[name])


def test_a_checkpoint_has_settings_versions_metrics_and_the_best_score(uninterrupted):
    progress = json.loads((uninterrupted / "checkpoints" / str(_STEPS) / "progress" / "metadata").read_text())
    assert progress["run"] == json.loads((uninterrupted / "config.json").read_text())
    assert progress["run"]["train"]["ema_decay"] == 0.9
    assert {"crossvit-jax", "jax", "flax", "optax", "python"} <= set(progress["run"]["versions"])
    assert "python" in progress["run"]["command"]
    lines = read_metrics(uninterrupted)
    before = [line for line in lines if "eval/ema_top1" in line][:-1]  # it is written before the evaluation
    assert progress["best"]["value"] == max(line[name] for line in before for name in ("eval/top1", "eval/ema_top1"))
    last = [line for line in lines if line["epoch"] == _EPOCHS and "train/loss" in line][-1]
    assert progress["meter"]["epoch"]["steps"] == _STEPS_PER_EPOCH
    window = progress["meter"]["window"]  # sums since the line before
    assert window["loss"] / window["steps"] == pytest.approx(last["train/loss"])


@pytest.mark.slow
def test_a_run_killed_20_times_ends_with_the_bits_of_an_uninterrupted_one(start, uninterrupted, tmp_path):
    chance = random.Random(0)
    folder, kills, lines = tmp_path / "run", 0, _logged(uninterrupted)
    while kills < 20:
        run = start(folder)
        # somewhat further each time, so that the moments cover the run: steps, saves, evaluations, and the start itself
        target = min(_logged(folder) + chance.choice([0, 1, 2, 3]), (kills + 1) * lines // 21)
        alive = run.wait_for(lambda target=target: _logged(folder) >= target and "run folder" in run.output)  # noqa: B023
        time.sleep(chance.uniform(0, 0.3))
        if alive:
            run.send(signal.SIGKILL)
        if run.wait() == -signal.SIGKILL:
            kills += 1
        else:
            pytest.fail(f"the run ended after {kills} kills: {run.output}")
    run = start(folder)
    assert run.wait() == 0, run.output
    _assert_same(folder, uninterrupted)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_run_saves_says_so_and_goes_on(start, uninterrupted, tmp_path, number, status):
    folder = tmp_path / "run"
    run = start(folder, "--checkpoint-every=1000", "--workers=1")
    assert run.wait_for(lambda: _logged(folder) >= 9), run.output
    sent = time.monotonic()
    run.send(number)
    assert run.wait() == status
    assert time.monotonic() - sent < 20
    step = _steps(folder)[-1]
    assert step % _STEPS_PER_EPOCH  # saved where it stood
    assert f"python -m train.main: saved after step {step} in {folder}" in run.output
    assert "error" not in run.output
    run = start(folder)
    assert run.wait() == 0, run.output
    assert f"continued after step {step} of {_STEPS}" in run.output
    _assert_same(folder, uninterrupted)


@pytest.mark.slow
def test_a_run_that_augments_on_the_device_goes_on_as_if_never_interrupted(start, image_folder, tmp_path):
    for i in range(72):
        image_folder(f"pictures/{'abc'[i % 3]}/{i}.jpg", size=(60, 50), seed=i)
    flags = [f"--dataset=folder:{image_folder() / 'pictures'}", "--val-fraction=0.1", "--batch-size=8", "--workers=1"]
    flags += ["--augment-on=device", "--image-size=48", "--hflip=0.5", "--erase-prob=0.5", "--log-every=1"]
    uninterrupted, folder = tmp_path / "uninterrupted", tmp_path / "run"
    run = start(uninterrupted, *flags)
    assert run.wait() == 0, run.output
    run = start(folder, *flags, "--checkpoint-every=1000")
    assert run.wait_for(lambda: _logged(folder) >= 10), run.output
    run.send(signal.SIGTERM)
    assert run.wait() == 143, run.output
    step = _steps(folder)[-1]
    run = start(folder, *flags)
    assert run.wait() == 0, run.output
    assert f"continued after step {step} of 32" in run.output
    _assert_same(folder, uninterrupted)


def test_a_second_signal_ends_at_once_and_one_before_the_first_step_too(start, tmp_path):
    run = start(tmp_path / "first")
    assert run.wait_for(lambda: _logged(tmp_path / "first") >= 2), run.output
    run.send(signal.SIGINT)
    run.send(signal.SIGTERM)
    assert run.wait() in (143, 130)
    assert "Traceback" not in run.output

    run = start(tmp_path / "second")
    time.sleep(2)
    run.send(signal.SIGTERM)
    assert run.wait() in (143, -signal.SIGTERM)
    assert not _steps(tmp_path / "second")


def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(start, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    newest = folder / "checkpoints" / str(_STEPS) / "state"
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    damaged = bytearray(largest.read_bytes())
    damaged[len(damaged) // 2] ^= 1  # one bit
    largest.write_bytes(damaged)
    run = start(folder)
    assert run.wait() == 0, run.output
    assert f"checkpoint {folder / 'checkpoints' / str(_STEPS)} is damaged" in run.output
    assert f"continued after step {_BEFORE_LAST} of {_STEPS}" in run.output
    assert (folder / "checkpoints" / f"{_STEPS}.damaged").is_dir()
    assert _STEPS in _steps(folder)
    _assert_same(folder, uninterrupted)


def test_when_all_checkpoints_are_damaged_the_run_is_not_begun_again(start, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    for step in _steps(folder):
        shutil.rmtree(folder / "checkpoints" / str(step) / "state")
    run = start(folder)
    assert run.wait() == 1
    assert "none of the checkpoints in" in run.output
    assert "Traceback" not in run.output


def test_checkpoints_that_cannot_be_listed_are_a_clear_error(uninterrupted, tmp_path, capsys, small_variant):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints").write_text("no folder")
    assert main(["--resume", str(folder)]) == 1
    error = capsys.readouterr().err
    assert f"cannot keep checkpoints in {folder / 'checkpoints'}" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--variant=s"], "variant was 'ti' and is 's'"),
        (["--epochs=5"], "epochs was 4 and is 5"),
        (["--augment-on=device"], "augment_on was 'host' and is 'device'"),
        (["--lr=2e-3", "--seed=1"], "lr was 0.001 and is 0.002; seed was 0 and is 1"),
    ],
)
def test_other_settings_are_refused_with_the_difference(uninterrupted, flags, message, capsys, small_variant):
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")}
    assert main(["--resume", str(uninterrupted), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")} == before


def test_other_data_and_classes_are_refused_with_the_difference(uninterrupted, image_folder, capsys, small_variant):
    for i in range(150):
        image_folder(f"pictures/{'abc'[i % 3]}/{i}.png", size=(8, 8), seed=i)
    assert main(["--resume", str(uninterrupted), f"--dataset=folder:{image_folder() / 'pictures'}"]) == 2
    error = capsys.readouterr().err
    assert "num_classes was 10 and is 3" in error
    assert "held_out_images was 57 and is 15" in error


def test_what_does_not_change_the_result_may_change(start, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    shutil.rmtree(folder / "checkpoints" / str(_STEPS))
    run = start(folder, "--workers=2", "--checkpoint-every=7")
    assert run.wait() == 0, run.output
    _assert_same(folder, uninterrupted)


def test_a_second_run_into_the_same_folder_is_refused(uninterrupted, capsys, small_variant, few_digits_dir):
    claim = Claim(uninterrupted)
    try:
        assert main(["--resume", str(uninterrupted)]) == 2
    finally:
        claim.close()
    assert f"another run is writing to {uninterrupted}" in capsys.readouterr().err


def test_a_full_disk_is_a_clear_error_and_the_older_checkpoint_is_intact(start, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    run = start(folder, "--checkpoint-every=1000")
    assert run.wait_for(lambda: _steps(folder)), run.output
    run.send(signal.SIGTERM)
    run.wait()
    kept = _steps(folder)
    run = start(folder, "--checkpoint-every=1000", file_limit=60_000)
    assert run.wait() == 1, run.output
    assert f"checkpoint could not be written in {folder / 'checkpoints'}" in run.output
    assert f"the last whole one is of step {kept[-1]}" in run.output
    assert "Traceback" not in run.output  # of Orbax's threads, thousands of lines
    assert _steps(folder) == kept
    run = start(folder)
    assert run.wait() == 0, run.output
    _assert_same(folder, uninterrupted)


def test_a_folder_that_cannot_be_written_is_a_clear_error(capsys, few_digits_dir, small_variant):
    assert main([f"--data-dir={few_digits_dir}", "--output=/proc/run", *_FLAGS]) == 2
    error = capsys.readouterr().err
    assert "cannot make the run's folder" in error
    assert error.count("\n") == 1


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_last_good_checkpoint(start, tmp_path):
    folder = tmp_path / "run"
    flags = ["--lr-stepping=step", "--lr-schedule=linear", "--warmup-epochs=3", "--lr=1e30", "--precision=float32"]
    run = start(folder, *flags, "--checkpoint-every=1", "--log-every=1")
    assert run.wait() == 1
    assert "the loss became" in run.output
    failed = int(run.output.partition(" in step ")[2].split()[0])
    assert 1 < failed < _STEPS
    assert _steps(folder)[-1] < failed
    assert max(line["step"] for line in read_metrics(folder)) < failed
    assert not (folder / "weights.safetensors").exists()


def test_a_data_set_that_vanishes_is_a_clear_error(start, image_folder, tmp_path):
    for i in range(400):
        image_folder(f"pictures/{'ab'[i % 2]}/{i}.png", size=(8, 8), seed=i)
    pictures = image_folder() / "pictures"
    folder = tmp_path / "run"
    run = start(folder, f"--dataset=folder:{pictures}", "--epochs=200", "--batch-size=16", "--workers=1")
    assert run.wait_for(lambda: _steps(folder)), run.output
    pictures.rename(tmp_path / "elsewhere")
    assert run.wait() == 1, run.output
    assert f"{pictures}" in run.output.splitlines()[-1]
    assert "Traceback" not in run.output
    assert _steps(folder)


def test_a_run_begun_before_a_setting_existed_goes_on_as_it_did():
    saved = {"train": {"lr": 1.0}, "model": {}, "data": {}}
    assert augment_on(RECIPES["digits"], saved) == "host"
    check_same_run(saved, {"train": {"lr": 1.0, "augment_on": "host"}, "model": {}, "data": {}}, "runs/old")
    with pytest.raises(SettingsError, match="augment_on was 'host' and is 'device'"):
        check_same_run(saved, {"train": {"lr": 1.0, "augment_on": "device"}, "model": {}, "data": {}}, "runs/old")
