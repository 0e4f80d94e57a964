"""Evaluation: timm's numbers, from any kind of weights, with the classes rightly matched."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import precision_recall_fscore_support

import train.predict
from convert.errors import SettingsError
from convert.metadata import describe
from crossvit_jax.preprocess import normalised
from tests.compilation import xla_flags
from tests.train.small_weights import save_small, small_config, small_timm_model
from train.config import TrainConfig
from train.data.datasets import open_digits, open_image_sets
from train.evaluate import main
from train.images.transforms import eval_transform
from train.inference.model import Classifier
from train.run.folder import describe_run, write_config
from train.tasks.classification import match_classes
from train.tasks.rates import calibration_error, mean_rates

_DIGITS = "0123456789"


@pytest.fixture
def evaluate(tmp_path, capsys):
    """Runs the command: status, output, errors, and the folder with what it wrote."""

    def _evaluate(*flags, name="evaluation"):
        folder = tmp_path / name
        # images come six at a time, so that the tests share a compiled program
        status = main([f"--output={folder}", "--batch-size=6", *map(str, flags)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err, folder

    return _evaluate


@pytest.fixture
def pictures(image_folder):
    """A folder of three classes of eight images, as a data set."""
    for i in range(24):
        image_folder(f"pictures/{'abc'[i % 3]}/{i:02}.png", seed=i)
    return image_folder() / "pictures"


def test_an_evaluation_replaces_an_earlier_one_and_no_other_file(evaluate, pictures, tmp_path, monkeypatch):
    weights = save_small(tmp_path / "w.safetensors", "abc")
    flags = [f"--weights={weights}", f"--dataset=folder:{pictures}", "--split=all"]
    (pictures / "a" / "confusion.png").write_bytes((pictures / "a" / "00.png").read_bytes())
    before = {path: path.read_bytes() for path in pictures.rglob("*.png")}
    status, out, error, folder = evaluate(*flags, name="pictures/a")
    assert (status, out) == (2, "")
    assert f"error: {folder / 'confusion.png'} exists and was not written by this command" in error.splitlines()[-1]
    assert {path: path.read_bytes() for path in pictures.rglob("*") if path.is_file()} == before

    assert evaluate(*flags)[0] == 0

    def fail(*_, **__):
        raise RuntimeError("no fonts")

    monkeypatch.setattr("train.tasks.classification.draw_confusion", fail)
    status, out, error, folder = evaluate(*flags)
    picture = folder / "confusion.png"
    assert status == 2
    assert error.endswith(f"python -m train.evaluate: error: {picture} could not be written: no fonts\n")
    assert "top-1 " in out  # what was computed is told
    assert (folder / "evaluation.json").exists()
    assert not picture.exists()  # that of the earlier evaluation


def _result(folder):
    return json.loads((folder / "evaluation.json").read_text())


def _rows(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def test_a_timm_checkpoint_gets_what_timm_itself_makes_of_the_digits(evaluate, small_variant, digits_dir, tmp_path):
    checkpoint = tmp_path / "timm.pth"
    model = small_timm_model(10)
    torch.save(model.state_dict(), checkpoint)
    status, out, error, folder = evaluate(
        f"--weights={checkpoint}", "--dataset=digits", f"--data-dir={digits_dir}", "--crop-pct=1", "--batch-size=100"
    )
    assert status == 0
    assert "the weights know no class names" in error

    source, transform = open_digits(digits_dir).held_out, eval_transform(small_config(10))
    samples = [transform(source[i]) for i in range(len(source))]
    labels = torch.tensor([int(sample["label"]) for sample in samples])
    with torch.inference_mode():
        logits = model(torch.tensor(normalised(np.stack([sample["image"] for sample in samples]))).permute(0, 3, 1, 2))
    predicted = logits.argmax(1)
    assert len(set(predicted.tolist())) > 3  # else the rest would say little
    confusion = np.zeros((10, 10), int)
    np.add.at(confusion, (labels.numpy(), predicted.numpy()), 1)
    top5 = (logits.topk(5).indices == labels[:, None]).any(1).float().mean().item()

    result = _result(folder)
    assert (result["images"], result["bad_images"]) == (359, 0)
    assert result["top1"] == pytest.approx(100 * np.trace(confusion) / 359)
    assert result["top5"] == pytest.approx(100 * top5)
    assert result["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), abs=1e-5)
    assert f"top-1         {result['top1']:.2f} %" in out

    head, *rows = _rows(folder / "confusion.csv")
    assert head[1:] == [row[0] for row in rows] == list(_DIGITS)
    np.testing.assert_array_equal(np.array([row[1:] for row in rows], int), confusion)
    _, *rows = _rows(folder / "per_class.csv")
    assert [row[0] for row in rows] == list(_DIGITS)
    np.testing.assert_array_equal([int(row[1]) for row in rows], confusion.sum(1))
    np.testing.assert_allclose([float(row[2]) for row in rows], 100 * np.diag(confusion) / confusion.sum(1), atol=0.01)
    assert (folder / "confusion.png").read_bytes().startswith(b"\x89PNG")


def test_weights_in_any_format_are_evaluated_alike(evaluate, pictures, tmp_path):
    results = []
    for name in ("timm.safetensors", "ours.flax.safetensors", "orbax"):
        weights = save_small(tmp_path / name, "abc")
        status, _, error, folder = evaluate(
            f"--weights={weights}", f"--dataset=folder:{pictures}", "--split=all", name=f"evaluation-{name}"
        )
        assert (status, error) == (0, "")
        result = _result(folder)
        results.append([result[key] for key in ("top1", "loss", "images", "model")])
        assert result["top5"] is None  # of three classes it would tell nothing
    assert results[0] == results[1] == results[2]
    assert results[0][2] == 24


def test_classes_in_another_order_are_matched_by_name(evaluate, pictures, tmp_path):
    results = {}
    for order in ("abc", "cab"):
        weights = save_small(tmp_path / f"{order}.safetensors", "abc", order=order)
        status, _, error, folder = evaluate(
            f"--weights={weights}", f"--dataset=folder:{pictures}", "--split=all", name=order
        )
        assert status == 0
        assert ("in another order" in error) == (order == "cab")
        results[order] = _result(folder), {row[0]: row[1:] for row in _rows(folder / "per_class.csv")}
        assert "".join(row[0] for row in _rows(folder / "per_class.csv")[1:]) == order
    (first, per_class), (second, per_class_too) = results.values()
    assert second["loss"] == pytest.approx(first["loss"], abs=1e-6)
    assert (second["top1"], per_class_too) == (first["top1"], per_class)


@pytest.fixture
def numbered(image_folder):
    """A folder of three classes whose text order is not the natural one."""
    for i in range(6):
        image_folder(f"numbered/{('class1', 'class2', 'class10')[i % 3]}/{i}.png", seed=i)
    return image_folder() / "numbered"


def test_outputs_without_names_are_taken_in_the_order_that_is_asked_for(evaluate, numbered, tmp_path):
    natural = ("class1", "class2", "class10")
    named = save_small(tmp_path / "named.safetensors", natural)
    nameless = save_small(tmp_path / "nameless.safetensors", None, classes=3)
    (tmp_path / "names.txt").write_text("\n".join(natural))

    def result(weights, *flags):
        status, _, error, folder = evaluate(
            f"--weights={weights}", f"--dataset=folder:{numbered}", "--split=all", *flags
        )
        assert status == 0, error
        return _result(folder)["loss"], [row[0] for row in _rows(folder / "per_class.csv")[1:]], error

    right, names, error = result(named)
    assert (tuple(names), error.count("\n")) == (natural, 1)
    wrong, names, error = result(nameless)
    assert (names, wrong != right) == (["class1", "class10", "class2"], True)
    (line,) = error.splitlines()
    assert "output i is taken for the data set's class i as text is sorted" in line
    assert "class 1 is 'class10', and 'class2' in timm's natural order: --class-order natural takes that" in line
    assert result(nameless, "--class-order=text")[0] == wrong
    for order in ("natural", tmp_path / "names.txt"):
        loss, names, error = result(nameless, f"--class-order={order}")
        assert (loss, tuple(names)) == (right, natural)
        assert "timm's" not in error
    loss, _, error = result(named, "--class-order=text")
    assert loss == right
    assert "the weights know their classes: they are matched by name, not in text order" in error


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        ("class1 class2", None, "names.txt names 2 classes, and the weights have 3"),
        ("class1 class2 class3", None, "only in the data set: class10"),
        ("class1 class10 class2", ("class1", "class2", "class10"), "the weights know other class names than"),
        (None, None, "names.txt is neither natural nor text, nor a file of class names: No such file or directory"),
    ],
)
def test_an_order_that_does_not_fit_is_one_line(evaluate, numbered, tmp_path, names, weights, message):
    if names:
        (tmp_path / "names.txt").write_text("\n".join(names.split()))
    source = save_small(tmp_path / "w.safetensors", weights, classes=3)
    status, out, error, folder = evaluate(
        f"--weights={source}", f"--dataset=folder:{numbered}", "--split=all", f"--class-order={tmp_path}/names.txt"
    )
    assert (status, out) == (2, "")
    assert message in error
    assert error.count("\n") == 1
    assert not folder.exists()


def test_some_of_the_weights_classes_are_evaluated_against_all_of_their_outputs(evaluate, pictures, tmp_path):
    weights = save_small(tmp_path / "w.safetensors", "abcdef", order="fcbaed")
    _, _, _, every = evaluate(f"--weights={weights}", f"--dataset=folder:{pictures}", "--split=all", name="every")
    shutil.rmtree(pictures / "a")
    shutil.rmtree(pictures / "c")
    status, _, error, folder = evaluate(f"--weights={weights}", f"--dataset=folder:{pictures}", "--split=all")
    assert status == 0, error
    assert "the data set has 1 of the 6 classes of the weights" in error
    rows = {row[0]: row[1:] for row in _rows(folder / "confusion.csv")}
    assert list(rows)[1:] == list("fcbaed")
    assert rows["b"] == next(row[1:] for row in _rows(every / "confusion.csv") if row[0] == "b")
    assert [sum(map(int, rows[name])) for name in "fcbaed"] == [0, 0, 8, 0, 0, 0]
    assert (_result(folder)["images"], _result(folder)["top5"] is not None) == (8, True)


def test_split_folders_are_evaluated_by_name(evaluate, image_folder, tmp_path):
    for seed, name in enumerate(
        ["Training/a", "Training/b", "VALID/a", "VALID/b", "VALID/b2", "Testing/b", "Testing/b2", "Testing/b3"]
    ):
        image_folder(f"data/{name[: name.index('/') + 2]}/{seed}.png", seed=seed)
    weights = save_small(tmp_path / "w.safetensors", "ab")
    flags = f"--weights={weights}", f"--dataset=folder:{image_folder()}/data"
    for split, images in (("held-out", 3), ("train", 2), ("val", 3), ("test", 3)):
        status, _, error, folder = evaluate(*flags, f"--split={split}")
        assert status == 0, error
        assert _result(folder)["images"] == images
        assert ("Testing has no images of 1 of the 2 classes: a" in error) == (split == "test")
    shutil.rmtree(image_folder() / "data" / "Training")
    status, _, error, _ = evaluate(*flags)
    assert status == 2
    assert "has VALID/ and Testing/ and no train/: it can only be evaluated, by --split val or test" in error
    status, _, error, folder = evaluate(*flags, "--split=test")
    assert (status, _result(folder)["images"]) == (0, 3)
    assert "the data set has 1 of the 2 classes of the weights" in error


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("abc", [0, 1, 2]),
        ("cab", [1, 2, 0]),
        ("xcab", [2, 3, 1]),
        (None, [0, 1, 2]),
    ],
)
def test_each_label_finds_its_output(weights, expected):
    classes, _ = match_classes("abc", weights, len(weights or "abc"))
    assert classes.tolist() == expected


@pytest.mark.parametrize(
    ("names", "classes", "message"),
    [
        ("abd", None, "only in the data set: c; only in the weights: d"),
        ("ab", None, "the data set has 3 classes, the weights have 2; only in the data set: c"),
        ("bcdefgh", None, "the weights have 7; only in the data set: a; only in the weights: d, e, f and 2 more"),
        (None, 4, "the data set has 3 classes, the weights have 4"),
    ],
)
def test_other_classes_are_refused_with_the_difference(evaluate, pictures, tmp_path, names, classes, message):
    weights = save_small(tmp_path / "w.safetensors", names, classes=classes)
    status, out, error, folder = evaluate(f"--weights={weights}", f"--dataset=folder:{pictures}")
    assert (status, out) == (2, "")
    assert message in error
    assert not folder.exists()


def test_a_name_that_stands_for_two_classes_only_matches_in_the_same_order():
    names = ["crane", "crane", "heron"]
    assert match_classes(names, names, 3)[0].tolist() == [0, 1, 2]
    with pytest.raises(SettingsError, match="the data set has 3 classes, the weights have 3"):
        match_classes(names, names[::-1], 3)


def test_the_held_out_images_are_those_of_training_unless_all_are_asked_for(evaluate, pictures, tmp_path):
    weights = save_small(tmp_path / "w.safetensors", "abc")

    def images(*flags):
        status, _, error, folder = evaluate(
            f"--weights={weights}", f"--dataset=folder:{pictures}", "--val-fraction=0.25", *flags
        )
        assert status == 0
        return _result(folder)["images"], "--split all takes all" in error

    assert images() == (6, True)
    assert images("--split=train") == (18, True)
    assert images("--split=all") == (24, False)


@pytest.fixture
def run_folder(pictures, tmp_path):
    """The folder of a run that held a quarter of the pictures out by seed 3, as far as an evaluation looks at it."""
    config = TrainConfig(variant="ti", dataset=f"folder:{pictures}", seed=3, val_fraction=0.25)
    sets = open_image_sets(config)
    folder = tmp_path / "run"
    folder.mkdir()
    save_small(folder / "weights.safetensors", "abc")
    model = describe(small_config(3), tuple("abc"))
    write_config(folder, describe_run(config, model=model, data={"fingerprint": sets.fingerprint}))
    return folder, [Path(path).name for path in sets.held_out.paths()]


def _evaluated(folder):
    return [Path(row[0]).name for row in _rows(folder / "predictions.csv")[1:]]


def test_weights_of_a_run_are_evaluated_on_the_images_that_it_held_out(evaluate, run_folder, pictures, tmp_path):
    run, held_out = run_folder
    status, out, error, folder = evaluate(f"--weights={run}")
    assert status == 0 and "other data" not in error
    assert f"folder:{pictures}: 6 images (25% of each class)" in out
    assert _evaluated(folder) == held_out
    _, _, _, folder = evaluate(f"--weights={run / 'weights.safetensors'}", "--seed=3", f"--dataset=folder:{pictures}")
    assert _evaluated(folder) == held_out
    moved = shutil.copytree(pictures, tmp_path / "moved")
    status, _, error, folder = evaluate(f"--weights={run}", f"--dataset=folder:{moved}")
    assert _evaluated(folder) == held_out
    assert f"note: the images are those of the run in {run}" in error
    (moved / "a" / "00.png").unlink()
    status, _, error, folder = evaluate(f"--weights={run}", f"--dataset=folder:{moved}")
    assert f"note: the run in {run} was trained on folder:{pictures}, and this is other data" in error
    assert "10% of each class are taken; --split all takes all" in error
    assert len(_evaluated(folder)) == 3


def test_another_split_than_that_of_the_run_is_refused(evaluate, run_folder, pictures):
    run, _ = run_folder
    status, out, error, _ = evaluate(f"--weights={run}", "--seed=0")
    assert (status, out, error.count("\n")) == (2, "", 1)
    assert f"is not split as in the run in {run}: seed 0, not 3 was asked for, so that images which it was" in error
    (pictures / "a" / "00.png").unlink()
    status, out, error, _ = evaluate(f"--weights={run}")
    assert (status, out) == (2, "")
    assert "images were added, removed or moved since then" in error and "--split all takes all images" in error
    status, _, error, _ = evaluate(f"--weights={run}", "--split=all")
    assert (status, f"the images that the run in {run} was trained on are among them" in error) == (0, True)


def test_weights_from_elsewhere_need_a_data_set(evaluate, tmp_path):
    status, out, error, _ = evaluate(f"--weights={save_small(tmp_path / 'w.safetensors', 'abc')}")
    assert (status, out) == (2, "")
    assert "--dataset is needed: the weights do not come from the folder of a run" in error


def test_rates_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    true, predicted = (
        rng.integers(4, size=60),
        rng.integers(5, size=60),
    )  # class 5 does not occur, class 4 only as wrong
    confusion = np.zeros((6, 6), int)
    np.add.at(confusion, (true, predicted), 1)
    ours = mean_rates(confusion)
    for kind in ("macro", "weighted"):
        theirs = precision_recall_fscore_support(true, predicted, average=kind, zero_division=0)
        for name, rate in zip(("precision", "recall", "f1"), theirs, strict=False):
            assert ours[f"{name}_{kind}"] == pytest.approx(100 * rate)


def test_the_calibration_error_is_the_distance_of_confidence_from_accuracy():
    assert calibration_error(np.full(10, 0.8), np.arange(10) < 8) == pytest.approx(0, abs=1e-12)
    assert calibration_error(np.ones(10), np.arange(10) < 6) == pytest.approx(40)
    confidence, right = np.array([0.34, 0.34, 0.95, 0.95]), np.array([True, False, True, True])
    assert calibration_error(confidence, right) == pytest.approx(100 * (0.5 * 0.16 + 0.5 * 0.05))


def test_every_image_has_a_line_and_an_unreadable_one_no_prediction(evaluate, pictures, tmp_path):
    (pictures / "b" / "01.png").write_bytes(b"no image")
    weights = save_small(tmp_path / "w.safetensors", "abc")
    status, out, _, folder = evaluate(f"--weights={weights}", f"--dataset=folder:{pictures}", "--split=all")
    assert status == 0
    head, *rows = _rows(folder / "predictions.csv")
    assert head == ["image", "class", "predicted", "probability"]
    assert [row[0] for row in rows] == [str(path) for path in sorted(pictures.rglob("*.png"))]
    assert rows[8] == [str(pictures / "b" / "01.png"), "", "", ""]
    right = [row[1] == row[2] for row in rows if row[2]]
    result = _result(folder)
    assert 100 * np.mean(right) == pytest.approx(result["top1"])
    assert all(1 / 3 < float(row[3]) <= 1 for row in rows if row[3])
    assert f"F1            {result['f1_macro']:.2f} % (mean of the classes)" in out
    assert f"calibration   {result['calibration_error']:.2f} %" in out


def test_unreadable_images_are_named_and_left_out(evaluate, pictures, tmp_path):
    weights = save_small(tmp_path / "w.safetensors", "abc")
    flags = f"--weights={weights}", f"--dataset=folder:{pictures}", "--split=all"
    (pictures / "b" / "04.png").write_bytes(b"no image")
    status, out, error, folder = evaluate(*flags)
    assert status == 0
    assert error.count("04.png") == 1
    assert "unreadable: 1" in out
    (pictures / "b" / "04.png").unlink()
    _, _, _, without = evaluate(*flags, name="without")
    result, expected = _result(folder), _result(without)
    assert (result["images"], result["bad_images"]) == (23, 1)
    assert result["loss"] == pytest.approx(expected["loss"], abs=1e-6)
    assert result["top1"] == expected["top1"]


def test_image_size_and_crop_change_what_the_model_sees(evaluate, pictures, tmp_path):
    weights = save_small(tmp_path / "w.safetensors", "abc")
    losses = []
    for flags in ([], ["--crop-pct=0.5"], ["--image-size=48x96"]):
        status, out, error, folder = evaluate(
            f"--weights={weights}", f"--dataset=folder:{pictures}", "--split=all", *flags
        )
        assert status == 0
        assert ("position embeddings resampled" in error) == ("--image-size" in str(flags))
        losses.append(_result(folder)["loss"])
    assert "at 48 x 96 pixels (crop 1)" in out
    assert _result(folder)["image_size"] == [48, 96]
    assert len(set(losses)) == 3


def test_the_files_of_an_earlier_evaluation_are_replaced_and_nothing_else(evaluate, pictures, tmp_path):
    weights = save_small(tmp_path / "w.safetensors", "abc")
    flags = f"--weights={weights}", f"--dataset=folder:{pictures}", "--val-fraction=0.25"
    _, _, _, folder = evaluate(*flags)
    (folder / "notes.txt").write_text("mine")
    before = _result(folder)
    _, _, _, folder = evaluate(*flags, "--split=all")
    assert _result(folder)["images"] > before["images"]
    assert {path.name for path in folder.iterdir()} == {
        *("evaluation.json", "per_class.csv", "predictions.csv", "confusion.csv", "confusion.png", "notes.txt")
    }


def test_without_output_nothing_is_written(pictures, tmp_path, monkeypatch, capsys):
    weights = save_small(tmp_path / "w.safetensors", "abc")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main([f"--weights={weights}", f"--dataset=folder:{pictures}", "--batch-size=6", "--split=all"]) == 0
    assert "top-1" in capsys.readouterr().out
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--weights=/nowhere.pth"], "/nowhere.pth does not exist"),
        (["--dataset=folder:/nowhere"], "there is no folder /nowhere"),
        (["--weights=~nobody-of-this-name/x"], "~nobody-of-this-name is nobody's home folder"),
        (["--dataset=folder:~nobody-of-this-name"], "argument --dataset: ~nobody-of-this-name: "),
        (["--data-dir=~nobody-of-this-name"], "argument --data-dir: ~nobody-of-this-name: "),
        (["--output=~nobody-of-this-name"], "argument --output: ~nobody-of-this-name: "),
        (["--dataset=cifar1O"], "did you mean 'cifar10'"),
        (["--dataset=digits", "--split=all"], "--split all is not for digits; choose held-out"),
        (["--image-size=50"], "does not divide into whole patches"),
        (["--image-size=0"], "argument --image-size: must be pixels"),
        (["--crop-pct=1.5"], "argument --crop-pct: must be above 0 and at most 1; got '1.5'"),
        (["--crop-pct=nan"], "argument --crop-pct: must be above 0"),
        (["--batch-size=0"], "argument --batch-size: must be a whole number, 1 or more; got '0'"),
        (["--workers=-1"], "argument --workers: must be a whole number, 0 or more"),
        (["--val-fraction=1"], "val_fraction must be above 0 and below 1"),
        (["--precision=float64"], "argument --precision: invalid choice: 'float64'"),
        (["stray"], "unrecognized arguments: stray"),
    ],
)
def test_what_cannot_work_is_one_line_and_status_2(pictures, tmp_path, capsys, flags, message):
    weights = save_small(tmp_path / "w.safetensors", "abc")
    try:
        status = main([f"--weights={weights}", f"--dataset=folder:{pictures}", *flags])
    except SystemExit as exit:
        status = exit.code
    out, error = capsys.readouterr()
    assert (status, out) == (2, "")
    assert message in error
    assert error.count("\n") == 1


def test_an_output_that_cannot_be_a_folder_is_one_line_and_status_2(evaluate, pictures, tmp_path):
    weights = save_small(tmp_path / "w.safetensors", "abc")
    (tmp_path / "evaluation").write_text("a file")
    status, out, error, _ = evaluate(f"--weights={weights}", f"--dataset=folder:{pictures}", "--split=all")
    assert (status, out) == (2, "")
    assert "evaluation: File exists" in error
    assert error.count("\n") == 1


def test_weights_that_are_no_numbers_are_refused(evaluate, pictures, tmp_path, monkeypatch):
    state = small_timm_model(3).state_dict()
    state["head.0.weight"][0, 0] = float("nan")
    monkeypatch.setattr("tests.train.small_weights.small_timm_model", lambda _: _Holding(state))
    weights = save_small(tmp_path / "w.safetensors", "abc")
    status, _, error, _ = evaluate(f"--weights={weights}", f"--dataset=folder:{pictures}")
    assert status == 2
    assert "weights are NaN or infinite: head.0.weight (1)" in error


class _Holding:
    def __init__(self, state):
        self.state_dict = lambda: state


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate"),
            2,
            "choose a smaller --batch-size",
        ),
        (MemoryError(), 2, "choose a smaller --batch-size"),
        (OSError(28, "No space left on device", "x"), 2, "x: No space left on device"),
    ],
)
def test_what_stops_it_halfway_is_one_line(pictures, tmp_path, monkeypatch, capsys, error, status, message):
    def fail(*_, **__):
        raise error

    weights = save_small(tmp_path / "w.safetensors", "abc")
    monkeypatch.setattr(Classifier, "compile", fail)
    assert main([f"--weights={weights}", f"--dataset=folder:{pictures}", "--split=all"]) == status
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


_BOTH_COMMANDS = """
import sys
import train.evaluate, train.predict

weights, data, evaluation = sys.argv[1:]
evaluated = train.evaluate.main(
    ["--weights", weights, "--dataset", f"folder:{data}", "--split=all", "--output", evaluation, "--batch-size=9"]
)
predicted = train.predict.main(["--weights", weights, "--format=csv", f"{data}/a"])
sys.exit(evaluated or predicted)
"""


@pytest.mark.slow
def test_eight_devices_evaluate_and_predict_as_one(evaluate, pictures, tmp_path, capsys):
    weights = save_small(tmp_path / "w.safetensors", "abc")
    (pictures / "c" / "23.png").write_bytes(b"no image")
    _, _, _, one = evaluate(f"--weights={weights}", f"--dataset=folder:{pictures}", "--split=all", name="one")
    assert train.predict.main([f"--weights={weights}", "--format=csv", f"{pictures}/a"]) == 0
    predicted = capsys.readouterr().out

    eight = tmp_path / "eight"
    done = subprocess.run(  # images come 16 at a time, which 8 devices divide, and 24 do not fill twice
        [sys.executable, "-c", _BOTH_COMMANDS, weights, pictures, eight],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(devices=8)},
    )
    assert "8 devices" in done.stdout
    assert (eight / "confusion.csv").read_text() == (one / "confusion.csv").read_text()
    one, eight = _result(one), _result(eight)
    assert eight["loss"] == pytest.approx(one["loss"], abs=1e-5)
    assert (one["images"], one["bad_images"]) == (eight["images"], eight["bad_images"]) == (23, 1)

    predicted_too = done.stdout[done.stdout.index("path,rank") :]
    rows, rows_too = ([line.split(",") for line in text.splitlines()[1:]] for text in (predicted, predicted_too))
    assert [row[:4] for row in rows] == [row[:4] for row in rows_too]
    np.testing.assert_allclose([float(row[4]) for row in rows], [float(row[4]) for row in rows_too], atol=1e-5)
