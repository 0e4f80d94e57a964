"""Evaluation at other patch sizes than those of the weights."""

import csv
import json

import numpy as np
import pytest
import torch

from convert import load_torch, save
from crossvit_jax.config import get_config
from crossvit_torch import create_model
from tests.train.small_weights import save_small, small_config
from train.cost.flops import macs_per_image
from train.data.datasets import open_digits
from train.evaluate import main
from train.images.transforms import eval_transform
from train.inference.patch_sizes import usual_patch_sizes

LARGER = (24, 32)


@pytest.fixture
def weights(tmp_path):
    return save_small(tmp_path / "w.safetensors", "0123456789")


def correct(weights, digits_dir, patch_size) -> float:
    """The share of held-out digits that the torch twin classifies rightly when called with a patch size."""
    source, transform = open_digits(digits_dir).held_out, eval_transform(small_config(10))
    samples = [transform(source[i]) for i in range(len(source))]
    images = torch.tensor(np.stack([sample["image"] for sample in samples])).permute(0, 3, 1, 2)
    with torch.inference_mode():
        predicted = load_torch(weights)(images, patch_size=patch_size).argmax(1).numpy()
    return 100 * float(np.mean(predicted == [int(sample["label"]) for sample in samples]))


def test_the_table_has_every_size_that_fits_and_its_accuracy(small_variant, weights, digits_dir, capsys):
    flags = [f"--weights={weights}", "--dataset=digits", f"--data-dir={digits_dir}", "--batch-size=100"]
    assert main([*flags, "--patch-size=all"]) == 0
    out, error = capsys.readouterr()
    assert "lose accuracy at patch sizes that they were not trained with" in error
    *_, head, larger, stored, smaller = out.splitlines()
    assert head.split() == ["patch", "size", "GMAC", "images/s", "top-1"]
    assert (larger.split()[0], stored.split()[:2], smaller.split()[0]) == ("24,32", ["12,16", "(stored)"], "6,8")
    top1 = {row.split()[0]: float(row.split()[-2]) for row in (larger, stored, smaller)}
    expected = {name: correct(weights, digits_dir, tuple(map(int, name.split(",")))) for name in top1}
    assert top1 == pytest.approx(expected, abs=0.005)
    assert len(set(expected.values())) > 1  # else the sizes would not be told apart


def test_one_other_size_is_evaluated_and_recorded(small_variant, weights, digits_dir, tmp_path, capsys):
    flags = [f"--weights={weights}", "--dataset=digits", f"--data-dir={digits_dir}", "--batch-size=100"]
    assert main([*flags, "--patch-size=24,32", f"--output={tmp_path / 'out'}"]) == 0
    assert "note: kernels resized from patches of 12 and 16 pixels to 24 and 32" in capsys.readouterr().err
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert result["patch_size"] == [24, 32]
    assert result["top1"] == pytest.approx(correct(weights, digits_dir, LARGER), abs=1e-6)
    with open(tmp_path / "out" / "predictions.csv", newline="") as file:
        assert len(list(csv.reader(file))) == 360


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--patch-size=10,16"], "patch_size 10 does not divide the image of branch 0, 48 x 48 pixels"),
        (["--patch-size=24x32"], "argument --patch-size: must be pixels, a number for each branch, such as 24,32"),
        (["--patch-size=all", "--output=out"], "--patch-size all prints a table: --output is for one patch size"),
    ],
)
def test_sizes_that_cannot_be_are_refused_in_one_line(weights, digits_dir, capsys, flags, message):
    try:
        status = main([f"--weights={weights}", "--dataset=digits", f"--data-dir={digits_dir}", *flags])
    except SystemExit as exit:
        status = exit.code
    out, error = capsys.readouterr()
    assert (status, out, error.count("\n")) == (2, "", 1)
    assert message in error


def test_weights_with_one_size_only_get_no_table(tmp_path, digits_dir, capsys):
    model = create_model("9-dagger", num_classes=10, stages=1, depth=(1, 1))
    weights = save(model.state_dict(), model.config, tmp_path / "dagger.safetensors")
    assert main([f"--weights={weights}", "--dataset=digits", f"--data-dir={digits_dir}", "--patch-size=all"]) == 2
    assert "dagger.safetensors has no other patch size: three convolutions embed" in capsys.readouterr().err


def test_the_sizes_compared_and_their_work_are_those_of_the_published_models():
    config = get_config("ti")
    sizes = [(24, 32), (20, 28), (12, 16), (10, 14), (8, 14), (6, 8)]
    assert usual_patch_sizes(config) == sizes
    gmacs = [macs_per_image(config.at_patch_size(size)) / 1e9 for size in sizes[:3]]
    assert gmacs == pytest.approx([0.36, 0.47, 1.50], abs=0.005)
    assert usual_patch_sizes(get_config("ti", image_size=48, image_scale=(1, 2 / 3))) == [(24, 32), (12, 16), (6, 8)]
