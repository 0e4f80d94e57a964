"""Whole runs: what they print, write and leave, and how they refuse what cannot work."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file

from convert import load_flax, load_weights
from convert.__main__ import main as convert_main
from convert.errors import SettingsError
from convert.metadata import understand
from crossvit_jax.preprocess import normalised
from tests import compilation
from train.data import streams
from train.data.datasets import open_digits
from train.data.sources import WorkersFailed
from train.evaluate import main as evaluate
from train.images.transforms import eval_transform
from train.loop import Result
from train.main import main
from train.recipes import RECIPES
from train.run.run_state import Best
from train.tasks.task import Metric

_SHORT = ["--epochs=2", "--batch-size=40", "--log-every=2", "--eval-every=2"]


def _lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def run(few_digits_dir, tmp_path, capsys):
    """Runs the command with flags: status, standard output and error, and the run's folder."""

    def _run(*flags, name="run"):
        status = main([f"--data-dir={few_digits_dir}", f"--output={tmp_path / name}", *flags])
        captured = capsys.readouterr()
        return status, captured.out, captured.err, tmp_path / name

    return _run


def test_a_run_leaves_settings_metrics_and_weights_and_tells_the_result(run, small_variant):
    status, out, _, folder = run(*_SHORT)
    assert status == 0
    names = {path.name.split(".")[0] for path in folder.iterdir() if path.name != ".lock"}
    pictures = {"curves", "train_batch", "predictions"}
    assert names == {"config", "metrics", "events", "weights", "weights-best", "checkpoints", *pictures}

    training = [line for line in _lines(folder) if "train/loss" in line]
    (evaluation,) = [line for line in _lines(folder) if "eval/loss" in line]
    # 5 steps an epoch: a line every 2 steps and at the end of each epoch
    assert [(line["step"], line["epoch"]) for line in training] == [(2, 1), (4, 1), (5, 1), (6, 2), (8, 2), (10, 2)]
    assert all(set(line) == {"step", "epoch", *_TRAINING} for line in training)
    assert set(evaluation) == {"step", "epoch", "eval/loss", "eval/top1", "eval/top5", "eval/bad_images"}
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

    for told in (
        f"top-1 {evaluation['eval/top1']:.2f} %",
        str(folder),
        "epoch 2/2",
        "images/s",
        "left",
        "memory per device",
    ):
        assert told in out


def test_without_a_better_evaluation_a_run_ends_when_its_patience_does(run, no_curves, small_variant):
    flags = ["--epochs=6", "--batch-size=112", "--lr=1e-7", "--min-lr=0", "--warmup-lr=0", "--patience=2"]
    status, out, _, folder = run(*flags)
    assert (status, "stopped after epoch 3: no evaluation was better for 2 epochs" in out) == (0, True)
    assert _lines(folder)[-1]["epoch"] == 3
    best, last = (load_weights(f"{folder}{which}") for which in ("", ":last"))
    assert "the weights after epoch 1, held-out top-1 " in best.notes[0]
    assert not np.array_equal(best.tensors["head.0.weight"], last.tensors["head.0.weight"])
    again = run(*flags)[1]
    assert "continued after step 6 of 12" in again and "epoch 4/6" not in again
    assert "epoch 6/6" in run(*flags, "--patience=6")[1]


class _Ending:
    """A stream whose worker process is killed after three batches."""

    def __init__(self, stream):
        self._left, self.close = iter(range(3)), stream.close
        self._stream = stream

    def __next__(self):
        if next(self._left, None) is None:
            raise WorkersFailed("a worker process was killed")
        return next(self._stream)


def test_the_steps_before_a_worker_process_died_are_saved(run, no_curves, small_variant, monkeypatch):
    with monkeypatch.context() as patch:
        opened = streams.open_train_stream
        patch.setattr(streams, "open_train_stream", lambda *args, **kwargs: _Ending(opened(*args, **kwargs)))
        status, _, err, folder = run(*_SHORT)
    assert status == 1
    told = f"a worker process was killed; saved after step 3; --resume {folder} goes on, --workers 0 needs no worker "
    assert f"python -m train.main: error: {told}processes\n" in err
    assert "continued after step 3 of 10" in run(*_SHORT)[1]


_TRAINING = ("train/loss", "train/top1", "train/lr", "train/bad_images")


def test_the_same_seed_gives_the_same_run_with_and_without_workers(run, no_curves, small_variant):
    first, again, other = (
        run(*_SHORT, f"--workers={workers}", f"--seed={seed}", name=name)[-1]
        for name, workers, seed in (("first", 0, 0), ("again", 1, 0), ("other", 0, 1))
    )
    assert _lines(first) == _lines(again)
    assert _lines(first) != _lines(other)
    weights, others = (load_file(folder / "weights.safetensors") for folder in (first, again))
    for name, tensor in weights.items():
        np.testing.assert_array_equal(tensor, others[name])


def test_a_folder_of_images_is_trained_on(run, no_curves, small_variant, image_folder):
    for i in range(24):
        image_folder(f"pictures/{'abc'[i % 3]}/{i}.png", seed=i)
    dataset = f"--dataset=folder:{image_folder() / 'pictures'}"
    status, _, _, folder = run(dataset, "--recipe=digits", "--epochs=1", "--batch-size=8", "--val-fraction=0.25")
    assert status == 0
    evaluation = _lines(folder)[-1]
    assert "eval/top1" in evaluation
    assert "eval/top5" not in evaluation  # of three classes it would tell nothing
    assert json.loads((folder / "config.json").read_text())["model"]["class_names"] == ["a", "b", "c"]


@pytest.mark.parametrize("exif", ["keep", "apply"])
def test_what_is_done_with_orientations_is_kept_with_the_run_and_done_again(
    run, no_curves, small_variant, image_folder, capsys, exif
):
    tag = Image.Exif()
    tag[0x0112] = 6
    for i in range(24):
        file = image_folder(f"pictures/{'ab'[i % 2]}/{i}.png", seed=i, size=(16, 20))
        if i < 8:
            with Image.open(file) as image:
                image.save(file, exif=tag)
    dataset = f"--dataset=folder:{image_folder() / 'pictures'}"
    flags = [dataset, "--recipe=digits", "--epochs=2", "--batch-size=9", "--val-fraction=0.25"]
    status, out, error, folder = run(*flags, f"--exif={exif}")
    assert (status, error) == (0, "")
    notes = [line for line in out.splitlines() if line.startswith("note: ")]
    done = "turned by it" if exif == "apply" else "taken as they are stored, as timm does; --exif apply turns them"
    told = rf"note: (\d+) of (\d+) (\S+) images carry .* and were {done}"
    training, held_out = (re.fullmatch(told, note) for note in notes)
    assert (training[3], training[2]) == ("training", "18")
    assert (held_out[3], held_out[2]) == ("held-out", "6")
    assert int(training[1]) + int(held_out[1]) == 8
    config = json.loads((folder / "config.json").read_text())
    assert config["train"]["exif"] == config["model"]["exif"] == exif
    assert load_weights(folder).exif == load_weights(folder / "checkpoints").exif == exif

    scores = folder / "scores"
    assert evaluate([f"--weights={folder}:last", dataset, "--val-fraction=0.25", f"--output={scores}"]) == 0
    result = json.loads((scores / "evaluation.json").read_text())
    assert (result["exif"], result["loss"]) == (exif, pytest.approx(_lines(folder)[-1]["eval/loss"], rel=1e-5))
    why = done if exif == "apply" else "taken as they are stored, as in training"
    assert f"note: {held_out[1]} of 6 images carry an EXIF orientation and were {why}\n" in capsys.readouterr().err

    status, _, error, _ = run(*flags, f"--exif={'keep' if exif == 'apply' else 'apply'}")
    assert status == 2
    assert f"exif was '{exif}' and is " in error


def test_a_loss_that_is_not_finite_ends_the_run_with_one_line(run, no_curves, small_variant):
    status, _, error, folder = run(*_SHORT, "--lr=1e30", "--lr-batch-size=40", "--warmup-epochs=0")
    assert status == 1
    assert "the loss became" in error
    assert error.count("\n") == 1
    assert not (folder / "weights.safetensors").exists()


def _folder_with_bad_images(image_folder):
    for i in range(60):
        image_folder(f"pictures/{'ab'[i % 2]}/{i}.png", seed=i)
    pictures = image_folder() / "pictures"
    (pictures / "a" / "4.png").write_bytes(b"no image")
    (pictures / "b" / "7.png").write_bytes(b"")
    whole = (pictures / "b" / "9.png").read_bytes()
    (pictures / "b" / "9.png").write_bytes(whole[: len(whole) // 2])
    return [f"--dataset=folder:{pictures}", "--recipe=digits", "--epochs=3", "--batch-size=8", "--val-fraction=0.2"]


def test_unreadable_images_are_named_once_and_counted_and_the_run_goes_on(run, no_curves, small_variant, image_folder):
    flags = _folder_with_bad_images(image_folder)
    status, out, _, folder = run(*flags, "--max-bad-images=0.2", "--workers=1")
    assert status == 0
    for name in ("4.png", "7.png", "9.png"):
        assert out.count(name) == 1
    lines = _lines(folder)
    bad = [line["train/bad_images"] for line in lines if "train/loss" in line]
    assert len(bad) == 3  # an epoch each
    assert 1 <= max(bad) <= 3
    held_out = {line["eval/bad_images"] for line in lines if "eval/loss" in line}
    assert len(held_out) == 1
    assert 3 - max(bad) >= held_out.pop() >= 0


def test_too_many_unreadable_images_end_the_run_with_their_names(run, no_curves, small_variant, image_folder):
    flags = _folder_with_bad_images(image_folder)
    for i in range(10, 24):
        (image_folder() / "pictures" / "ab"[i % 2] / f"{i}.png").write_bytes(b"no image")
    status, _, error, _ = run(*flags)
    assert status == 1
    assert error.count("\n") == 1
    assert "cannot be read, more than the share of 0.01 that is accepted (--max-bad-images)" in error
    assert ".png" in error


def test_held_out_images_are_looked_at_before_the_first_epoch(run, no_curves, small_variant, image_folder):
    for i in range(60):
        path = image_folder(f"{'train' if i < 48 else 'val'}/{'ab'[i % 2]}/{i}.png", seed=i)
        if i > 55:
            path.write_bytes(b"no image")
    flags = [f"--dataset=folder:{image_folder()}", "--recipe=digits", "--epochs=3", "--batch-size=8"]
    status, out, error, folder = run(*flags)
    assert (status, folder.exists()) == (1, False)
    assert "4 of 12 images cannot be read, more than the share of 0.01 that is accepted" in error
    assert "the first step was done" not in out


@pytest.fixture
def timm_checkpoint(run, no_curves, small_variant, tmp_path):
    """A file as timm saves it, for the ten digits at 48 pixels."""
    *_, folder = run("--epochs=1", name="pretrained")
    path = tmp_path / "pretrained.pth"
    assert convert_main([str(folder / "weights.safetensors"), str(path)]) == 0
    return path


def test_fine_tuning_takes_the_weights_a_new_head_and_a_new_size_and_says_so(run, timm_checkpoint, image_folder):
    for i in range(24):
        image_folder(f"pictures/{'abc'[i % 3]}/{i}.png", seed=i)
    data = [f"--dataset=folder:{image_folder() / 'pictures'}", "--recipe=digits", "--epochs=1", "--batch-size=8"]
    status, out, error, folder = run(*data, f"--init={timm_checkpoint}", "--image-size=96", "--lr=1e-9", "--min-lr=0")
    assert status == 0, error
    assert "note: new head for 3 classes instead of 10" in out
    assert "note: position embeddings resampled from 4 x 4 and 2 x 2 patches to 8 x 8 and 4 x 4" in out
    before, after = load_flax(timm_checkpoint), load_flax(folder / "weights.safetensors")
    assert after.config.image_size == (96, 96)
    kernels = [np.asarray(model.blocks[0].blocks[1][0].mlp.fc1.kernel[...]) for model in (before, after)]
    np.testing.assert_allclose(*kernels, atol=1e-6)
    status, out, error, _ = run(*data, f"--init={timm_checkpoint}", "--variant=s", name="other")
    assert status == 2
    assert "holds ti, not the variant s" in error


def test_a_run_without_a_checkpoint_starts_as_a_new_one_does_and_one_with_draws_no_weights(
    run, timm_checkpoint, monkeypatch
):
    flags = [f"--init={timm_checkpoint}", "--epochs=1", "--batch-size=40", "--log-every=2"]
    status, _, error, folder = run(*flags)
    assert status == 0, error
    expected, logged = load_file(folder / "weights.safetensors"), (folder / "metrics.jsonl").read_text()

    def none_is_drawn(*_):
        raise AssertionError("a new state was made")

    with monkeypatch.context() as patch:
        patch.setattr("train.optim.programs.lower_init", none_is_drawn)
        assert main([f"--resume={folder}"]) == 0

    shutil.rmtree(folder / "checkpoints")  # as if it had been killed before the first
    status, again, error, _ = run(*(flag for flag in flags if "--init" not in flag))  # config.json names them, too
    assert status == 0, error
    assert "continued after step 0 of 5" in again
    assert (folder / "metrics.jsonl").read_text() == logged
    for name, tensor in load_file(folder / "weights.safetensors").items():
        np.testing.assert_array_equal(tensor, expected[name])


def test_what_is_going_to_happen_is_told_before_anything_is_compiled(run, small_variant, monkeypatch):
    def fail(*_, **__):
        raise SettingsError("stopped here")

    monkeypatch.setattr("train.loop.Programs", fail)
    status, out, error, folder = run(*_SHORT)
    assert (status, error) == (2, "python -m train.main: error: stopped here\n")
    model, data, where, last = out.splitlines()
    assert model.startswith("CrossViT ti at 48 pixels, 10 classes, recipe digits, batch 40")
    assert data.startswith("digits: 224 training images, 57 held out")
    assert (where, last) == (f"run folder {folder}", "compiling the training step …")
    assert not folder.exists()  # nothing was written


def test_the_head_is_kept_for_the_same_classes_and_replaced_for_others_of_the_same_number(
    run, timm_checkpoint, image_folder
):
    _, out, _, folder = run(f"--init={timm_checkpoint}", "--epochs=1", "--lr=1e-9", "--min-lr=0", name="nameless")
    assert "note: the head is kept: it has 10 classes too, and their names are not known" in out
    _, out, _, _ = run(f"--init={folder / 'weights.safetensors'}", "--epochs=1", name="named")
    assert "note: the head is kept: it is for these classes" in out
    for i in range(40):
        image_folder(f"pictures/class {i % 10}/{i}.png", seed=i)
    data = [f"--dataset=folder:{image_folder() / 'pictures'}", "--recipe=digits", "--epochs=1", "--batch-size=8"]
    status, out, error, _ = run(*data, f"--init={folder / 'weights.safetensors'}", name="others")
    assert status == 0, error
    assert "note: new head: the 10 classes are others than those of the weights" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--variant=tii"], "did you mean 'ti'"),
        (["--image-size=50"], "does not divide into whole patches"),
        (["--dataset=cifar1O"], "did you mean 'cifar10'"),
        (["--dataset=folder:/nowhere"], "there is no folder /nowhere"),
        (["--batch-size=2000"], "batch_size 2000 is more than the 224 training images"),
        (["--auto-augment=rand-q9"], "timm does not understand auto_augment 'rand-q9'"),
        (["--epochs=0"], "epochs must be at least 1"),
        (["--mesh=data=3"], "mesh data=3 takes 3 devices; there are 1"),
        (["--init=nowhere.safetensors"], "nowhere.safetensors"),
        (["--wandb=project"], "--wandb needs the package wandb"),
        (["--resume=nowhere"], "name two folders"),
        (["--batch-size=64", "--grad-accum=3"], "batch_size 64 cannot be cut into grad_accum 3 parts"),
    ],
)
def test_what_cannot_work_is_one_line_and_status_2_and_leaves_nothing(
    run, tmp_path, flags, message, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
    try:
        status, _, error, folder = run(*flags)
    except SystemExit as exit:
        status, error, folder = exit.code, capsys.readouterr().err, tmp_path / "run"
    assert status == 2
    assert message in error
    assert error.count("\n") == 1
    assert not folder.exists()


def test_a_run_that_may_compile_nothing_is_refused(run):
    with jax.disable_jit():
        status, _, error, folder = run()
    assert status == 2 and not folder.exists()
    assert error.count("\n") == 1 and "JAX_DISABLE_JIT" in error


def test_the_last_lines_tell_the_scores_of_the_weights_from_those_of_their_average(tmp_path):
    metrics, final = (Metric("top1", "top-1", "%", "max"),), {"eval/top1": 80.0, "eval/loss": 0.5}
    assert Result(tmp_path, metrics, final, Best(85, 3, 30), 61).summary() == (
        "held-out top-1 80.00 %, loss 0.5000 (best top-1 85.00 %, epoch 3); 1 min 01 s\n"
        f"run folder {tmp_path}, weights {tmp_path}/weights.safetensors, "
        f"of the best evaluation {tmp_path}/weights-best.safetensors"
    )
    final |= {"eval/ema_top1": 90.0, "eval/ema_loss": 0.25}
    assert Result(tmp_path, metrics, final, Best(91, 3, 30, "ema"), 61).summary() == (
        "held-out top-1 80.00 %, loss 0.5000; average of the weights top-1 90.00 %, loss 0.2500 "
        "(best top-1 91.00 %, epoch 3, of the average); 1 min 01 s\n"
        f"run folder {tmp_path}, weights {tmp_path}/weights.safetensors, "
        f"their average {tmp_path}/weights-ema.safetensors, "
        f"of the best evaluation {tmp_path}/weights-best.safetensors"
    )


def test_an_epoch_of_repeated_augmentation_may_be_too_short_for_a_batch(run, digits_dir):
    status, _, error, _ = run(f"--data-dir={digits_dir}", "--batch-size=1438", "--repeated-aug=3")
    assert status == 2
    assert "rounded down to a multiple of 256" in error


_WANDB = """
calls = []

class Run:
    def log(self, values, step):
        calls.append((step, values))

    def finish(self):
        calls.append("finished")

def init(**settings):
    calls.append(settings)
    return Run()
"""


def test_weights_and_biases_gets_the_metrics_and_a_continued_run_the_same_name(
    run, no_curves, small_variant, tmp_path, monkeypatch
):
    (tmp_path / "wandb.py").write_text(_WANDB)
    spec = importlib.util.spec_from_file_location("wandb", tmp_path / "wandb.py")
    wandb = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(wandb)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for _ in range(2):
        status, _, error, _ = run(*_SHORT, "--wandb=digits")
        assert status == 0, error

    first, second = (call for call in wandb.calls if isinstance(call, dict))
    assert first["project"] == "digits"
    assert first["id"] == second["id"]
    assert first["config"]["train"]["epochs"] == 2
    logged = [call for call in wandb.calls if isinstance(call, tuple)]
    assert {"train/loss", "train/images_per_s", "eval/top1"} <= {name for _, values in logged for name in values}
    assert wandb.calls[-1] == "finished"


def test_drawing_and_logging_never_end_a_run_and_come_after_the_weights(run, small_variant, tmp_path, monkeypatch):
    def no_key(**_):
        raise RuntimeError("no API key")

    def cannot_draw(*_):
        assert (tmp_path / "run" / "weights.safetensors").exists()
        raise ImportError("no fonts")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=no_key, __spec__=True))
    monkeypatch.setattr("train.loop.draw_curves", cannot_draw)
    monkeypatch.setitem(sys.modules, "tensorboardX.event_file_writer", None)
    status, out, error, folder = run(*_SHORT, "--wandb=digits")
    assert (status, error) == (0, "")
    notes = [line for line in out.splitlines() if line.startswith("note: ")]
    assert [(note.split(": ")[1], note.split("; ")[-1]) for note in notes] == [
        (name, "left out from now on") for name in ("Weights & Biases", "TensorBoard", "curves.png")
    ]
    assert "no API key" in notes[0] and "no fonts" in notes[2]
    assert len(_lines(folder)) == 7
    assert f"weights {folder / 'weights.safetensors'}" in out


def test_a_folder_that_holds_something_is_refused(run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    status, _, error, _ = run()
    assert status == 2
    assert "holds something, but no run to continue" in error


def test_without_output_a_new_folder_under_runs_is_made(
    few_digits_dir, no_curves, small_variant, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main([f"--data-dir={few_digits_dir}", *_SHORT]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("ti-digits-")


# --- the real thing ---


def _right_in_timm(checkpoint, data_dir):
    """How many of the held-out images timm gets right with it."""
    model = timm.create_model("crossvit_tiny_240", num_classes=10, img_size=48, img_scale=(1.0, 2 / 3))
    model.load_state_dict(torch.load(checkpoint, weights_only=True), strict=True)
    source, transform = open_digits(data_dir).held_out, eval_transform(RECIPES["digits"].model_config(10))
    samples = [transform(source[i]) for i in range(len(source))]
    images = torch.tensor(normalised(np.stack([sample["image"] for sample in samples]))).permute(0, 3, 1, 2)
    with torch.no_grad():
        right = model.eval()(images).argmax(1).numpy() == [sample["label"] for sample in samples]
    return right.sum()


@pytest.mark.slow
def test_the_main_job_learns_the_digits_and_timm_and_bfloat16_score_the_same_with_its_weights(digits_dir, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "train.main", "--variant", "ti", "--epochs", "6"]
    command += ["--data-dir", digits_dir, "--output", str(folder)]
    environment = {**os.environ, "XLA_FLAGS": compilation.xla_flags(compilation.AS_FOR_USERS)}
    out = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    losses = [line["train/loss"] for line in _lines(folder) if "train/loss" in line]
    assert losses[-1] < 0.7 * losses[0]
    top1 = _lines(folder)[-1]["eval/top1"]
    assert top1 > 85  # after all epochs of the recipe it is above 95
    assert f"top-1 {top1:.2f} %" in out

    assert convert_main([str(folder / "weights.safetensors"), str(tmp_path / "timm.pth")]) == 0
    right = _right_in_timm(tmp_path / "timm.pth", digits_dir)
    assert right == round(top1 / 100 * 359)
    np.testing.assert_allclose(100 * right / 359, top1)

    results, runs = {}, (("float32", "held-out"), ("float32", "train"), ("bfloat16", "train"))
    flags = ["--weights", str(folder), "--dataset", "digits", "--data-dir", digits_dir]
    calls = [[*flags, "--precision", p, "--split", s, "--output", str(tmp_path / f"{p}-{s}")] for p, s in runs]
    code = f"from train.evaluate import main; assert not any([main(flags) for flags in {calls}])"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)
    for precision, split in runs:
        evaluation = json.loads((tmp_path / f"{precision}-{split}" / "evaluation.json").read_text())
        results[precision, split] = evaluation["top1"]
    assert results["float32", "held-out"] == pytest.approx(top1)
    # one of the 1,438 images is 0.07
    assert results["bfloat16", "train"] == pytest.approx(results["float32", "train"], abs=0.2)
