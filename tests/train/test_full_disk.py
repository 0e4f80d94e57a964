"""A file that was asked for and finds no room on the disk ends a command with one line and a status that tells it."""

import os
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import convert
from crossvit_jax.detection import CrossViTDetector
from crossvit_jax.segmentation import CrossViTSegmenter
from tests.small_model import small_detector, small_segmenter
from tests.train.small_weights import save_small
from train import evaluate, predict
from train.run.best_effort import BestEffort


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Of a classifier, a detector and a segmenter."""
    folder = tmp_path_factory.mktemp("weights")
    paths = {"classification": save_small(folder / "c.safetensors", "ab")}
    for kind, config in ((CrossViTDetector, small_detector()), (CrossViTSegmenter, small_segmenter())):
        params = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(kind(config, rngs=nnx.Rngs(0)))))
        names = [f"class {number}" for number in range(config.num_classes)]
        paths[config.task] = convert.save(params, config, folder / f"{config.task}.safetensors", class_names=names)
    return paths


@pytest.fixture
def pictures(image_folder):
    for number in range(4):
        image_folder(f"pictures/{'ab'[number % 2]}/{number}.png", seed=number)
    return image_folder() / "pictures"


@pytest.fixture
def full_for(monkeypatch):
    """The disk is full for files of a name."""
    replace = os.replace

    def full(name):
        def fail_or_replace(source, target, **how):
            if Path(target).name == name:
                raise OSError(28, "No space left on device", os.fspath(target))
            replace(source, target, **how)

        monkeypatch.setattr(os, "replace", fail_or_replace)

    return full


def _last(error):
    """The last line of ours: on a slow machine XLA may tell how slowly it compiles, at any time."""
    return [line for line in error.splitlines() if line.startswith("python -m train.")][-1]


@pytest.mark.parametrize(
    ("task", "flag", "name"),
    [
        ("classification", "--attention", "2.png"),
        ("detection", "--overlay", "2.png"),
        ("detection", "--coco", "found.json"),
        ("segmentation", "--masks", "2.png"),
        ("segmentation", "--overlay", "2.png"),
    ],
)
def test_a_prediction_that_cannot_be_written_is_one_line_and_no_success(
    task, flag, name, weights, pictures, full_for, tmp_path, capfd
):
    full_for(name)
    place = tmp_path / "found.json" if flag == "--coco" else tmp_path / "out"
    given = [pictures / "a" / "0.png", pictures / "a" / "2.png"]
    status = predict.main([f"--weights={weights[task]}", "--batch-size=1", f"{flag}={place}", *map(str, given)])
    error = capfd.readouterr().err
    written = place if flag == "--coco" else place / name
    assert status == 2
    assert _last(error).endswith(f"error: {written} could not be written: no space left on device")
    assert sum("no space" in line for line in error.lower().splitlines()) == 1
    assert not written.exists()


@pytest.mark.parametrize("name", ["evaluation.json", "predictions.csv", "confusion.png"])
def test_an_evaluation_that_cannot_be_written_is_one_line_and_no_success(
    name, weights, pictures, full_for, tmp_path, capfd
):
    full_for(name)
    folder = tmp_path / "evaluation"
    flags = [f"--weights={weights['classification']}", f"--dataset=folder:{pictures}", "--split=all", "--batch-size=1"]
    status = evaluate.main([*flags, f"--output={folder}"])
    error = capfd.readouterr().err
    assert status == 2
    assert _last(error).endswith(f"error: {folder / name} could not be written: no space left on device")
    assert not (folder / name).exists()


@pytest.mark.parametrize(("task", "drawing"), [("detection", "with_boxes"), ("segmentation", "with_segments")])
def test_an_overlay_that_cannot_be_drawn_is_one_line_and_no_success(
    task, drawing, weights, pictures, tmp_path, monkeypatch, capfd
):
    def fail(*_, **__):
        raise RuntimeError("no fonts\nat all")

    monkeypatch.setattr(f"train.inference.dense.{drawing}", fail)
    out, given = tmp_path / "out", str(pictures / "a" / "0.png")
    assert predict.main([f"--weights={weights[task]}", "--batch-size=1", f"--overlay={out}", given]) == 2
    assert _last(capfd.readouterr().err).endswith(f"error: {out / '0.png'} could not be written: no fonts")
    assert not list(out.iterdir())


def test_what_nobody_asked_for_stays_a_note():
    def fail():
        raise convert.files.NotWritten(Path("curves.png"), "no space left on device")

    told = []
    assert BestEffort("curves.png", told.append)(fail) is None
    assert told == ["note: curves.png: curves.png could not be written: no space left on device; left out from now on"]
