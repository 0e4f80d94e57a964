"""Whole runs: what they print, write and leave, and how they refuse what cannot work."""

import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from convert import load_flax
from convert.metadata import understand
from train.config import RECIPES
from train.main import main

_SHORT = ["--epochs=2", "--batch-size=240", "--log-every=2", "--eval-every=2"]


def _lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def run(digits_dir, tmp_path, capsys):
    """Runs the command with flags: status, standard output and error, and the run's folder."""

    def _run(*flags, name="run"):
        status = main([f"--data-dir={digits_dir}", f"--output={tmp_path / name}", *flags])
        captured = capsys.readouterr()
        return status, captured.out, captured.err, tmp_path / name

    return _run


def test_a_run_leaves_settings_metrics_and_weights_and_tells_the_result(run, small_variant):
    status, out, _, folder = run(*_SHORT)
    assert status == 0
    assert {path.name.split(".")[0] for path in folder.iterdir()} == {"config", "metrics", "events", "weights"}

    training = [line for line in _lines(folder) if "train/loss" in line]
    (evaluation,) = [line for line in _lines(folder) if "eval/loss" in line]
    # 5 steps an epoch: a line every 2 steps and at the end of each epoch
    assert [(line["step"], line["epoch"]) for line in training] == [(2, 1), (4, 1), (5, 1), (6, 2), (8, 2), (10, 2)]
    assert all(set(line) == {"step", "epoch", *_TRAINING} for line in training)
    assert set(evaluation) == {"step", "epoch", "eval/loss", "eval/top1", "eval/top5"}
    assert evaluation["step"] == 10
    assert 0 <= evaluation["eval/top1"] <= evaluation["eval/top5"] <= 100

    config = json.loads((folder / "config.json").read_text())
    assert config["train"]["epochs"] == 2
    assert config["train"]["lr"] == RECIPES["digits"].lr
    model_config, class_names = understand(config["model"])
    assert (model_config.image_size, model_config.num_classes) == ((48, 48), 10)
    assert class_names == tuple("0123456789")
    with safe_open(folder / "weights.safetensors", "numpy") as file:
        assert understand(file.metadata()["crossvit"]) == (model_config, class_names)
    assert load_flax(folder / "weights.safetensors").config == model_config

    for told in (f"top-1 {evaluation['eval/top1']:.2f} %", str(folder), "epoch 2/2", "images/s", "left"):
        assert told in out


_TRAINING = ("train/loss", "train/top1", "train/lr", "train/images_per_s")


def test_the_same_seed_gives_the_same_run_with_and_without_workers(run, small_variant):
    def results(folder):
        timing = "train/images_per_s"
        return [{name: value for name, value in line.items() if name != timing} for line in _lines(folder)]

    first, again, other = (
        run(*_SHORT, f"--workers={workers}", f"--seed={seed}", name=name)[-1]
        for name, workers, seed in (("first", 0, 0), ("again", 1, 0), ("other", 0, 1))
    )
    assert results(first) == results(again)
    assert results(first) != results(other)
    weights, others = (load_file(folder / "weights.safetensors") for folder in (first, again))
    for name, tensor in weights.items():
        np.testing.assert_array_equal(tensor, others[name])


def test_a_folder_of_images_is_trained_on(run, small_variant, image_folder):
    for i in range(24):
        image_folder(f"pictures/{'abc'[i % 3]}/{i}.png", seed=i)
    dataset = f"--dataset=folder:{image_folder() / 'pictures'}"
    status, _, _, folder = run(dataset, "--recipe=digits", "--epochs=1", "--batch-size=8", "--val-fraction=0.25")
    assert status == 0
    evaluation = _lines(folder)[-1]
    assert "eval/top1" in evaluation
    assert "eval/top5" not in evaluation  # of three classes it would tell nothing
    assert json.loads((folder / "config.json").read_text())["model"]["class_names"] == ["a", "b", "c"]


def test_a_loss_that_is_not_finite_ends_the_run_with_one_line(run, small_variant):
    status, _, error, folder = run(*_SHORT, "--lr=1e30", "--lr-batch-size=240", "--warmup-epochs=0")
    assert status == 1
    assert "the loss became" in error
    assert error.count("\n") == 1
    assert not (folder / "weights.safetensors").exists()


def test_an_unreadable_image_ends_the_run_with_its_name(run, small_variant, image_folder):
    for i in range(8):
        image_folder(f"pictures/only/{i}.png")
    (image_folder() / "pictures" / "only" / "3.png").write_bytes(b"no image")
    dataset = f"--dataset=folder:{image_folder() / 'pictures'}"
    status, _, error, _ = run(dataset, "--recipe=digits", "--epochs=1", "--batch-size=2", "--log-every=1")
    assert status == 1
    assert "cannot read image" in error
    assert "3.png" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--variant=tii"], "did you mean 'ti'"),
        (["--image-size=50"], "does not divide into whole patches"),
        (["--dataset=cifar1O"], "did you mean 'cifar10'"),
        (["--dataset=folder:/nowhere"], "there is no folder /nowhere"),
        (["--batch-size=2000"], "batch_size 2000 is more than the 1438 training images"),
        (["--auto-augment=rand-q9"], "timm does not understand auto_augment 'rand-q9'"),
        (["--epochs=0"], "epochs must be at least 1"),
    ],
)
def test_what_cannot_work_is_one_line_and_status_2_and_leaves_nothing(run, tmp_path, flags, message, capsys):
    try:
        status, _, error, folder = run(*flags)
    except SystemExit as exit:
        status, error, folder = exit.code, capsys.readouterr().err, tmp_path / "run"
    assert status == 2
    assert message in error
    assert error.count("\n") == 1
    assert not folder.exists()


def test_a_folder_that_holds_something_is_refused(run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    status, _, error, _ = run()
    assert status == 2
    assert "is not an empty folder" in error


def test_without_output_a_new_folder_under_runs_is_made(digits_dir, small_variant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([f"--data-dir={digits_dir}", *_SHORT]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("ti-digits-")


# --- the real thing ---

_TIMM = """
import sys
import numpy as np, timm, torch
from train.sources import open_digits
from train.config import RECIPES
from train.transforms import eval_transform

checkpoint, data_dir = sys.argv[1:]
model = timm.create_model("crossvit_tiny_240", num_classes=10, img_size=48, img_scale=(1.0, 2 / 3))
model.load_state_dict(torch.load(checkpoint, weights_only=True), strict=True)
source, transform = open_digits(data_dir).held_out, eval_transform(RECIPES["digits"].model_config(10))
samples = [transform(source[i]) for i in range(len(source))]
images = torch.tensor(np.stack([sample["image"] for sample in samples])).permute(0, 3, 1, 2)
with torch.no_grad():
    right = model.eval()(images).argmax(1).numpy() == [sample["label"] for sample in samples]
print(right.sum())
"""


@pytest.mark.slow
def test_the_main_job_learns_the_digits_and_timm_scores_the_same_with_its_weights(digits_dir, tmp_path):
    def python(*arguments):
        return subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True).stdout

    folder = tmp_path / "run"
    out = python(
        *("-m", "train.main", "--variant", "ti", "--epochs", "6"),
        *("--data-dir", digits_dir, "--output", str(folder)),
    )
    losses = [line["train/loss"] for line in _lines(folder) if "train/loss" in line]
    assert losses[-1] < 0.7 * losses[0]
    top1 = _lines(folder)[-1]["eval/top1"]
    assert top1 > 85  # after all epochs of the recipe it is above 95
    assert f"top-1 {top1:.2f} %" in out

    python("-m", "convert", str(folder / "weights.safetensors"), str(tmp_path / "timm.pth"))
    right = int(python("-c", _TIMM, str(tmp_path / "timm.pth"), digits_dir))
    assert right == round(top1 / 100 * 359)
    np.testing.assert_allclose(100 * right / 359, top1)
