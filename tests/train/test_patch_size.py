"""Other patch sizes than those of the weights, in training and evaluation."""

import csv
import dataclasses
import json
import shutil
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import convert
import train.main
from convert import load_torch, load_weights, save
from convert.models import torch_model
from convert.tree import flatten
from convert.weights import Weights
from crossvit_jax.config import get_config
from crossvit_jax.preprocess import normalised
from crossvit_torch import create_model
from tests.train.small_weights import save_small, small_config
from train.cost.flops import macs_per_image
from train.data.datasets import open_digits
from train.data.entropies import grey_entropy
from train.devices.mesh import make_mesh
from train.evaluate import main
from train.images.transforms import eval_transform
from train.inference.allocation import compared_patch_sizes
from train.optim import programs
from train.optim.programs import Plan, Programs
from train.recipes import RECIPES
from train.tasks.begin import variants_of
from train.tasks.classification import Classification

LARGER = (24, 32)


@pytest.fixture
def weights(tmp_path):
    return save_small(tmp_path / "w.safetensors", "0123456789")


def correct(weights, digits_dir, patch_size) -> float:
    """The share of held-out digits that the torch twin classifies rightly when called with a patch size."""
    source, transform = open_digits(digits_dir).held_out, eval_transform(small_config(10))
    samples = [transform(source[i]) for i in range(len(source))]
    images = torch.tensor(normalised(np.stack([sample["image"] for sample in samples]))).permute(0, 3, 1, 2)
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
    assert compared_patch_sizes(config) == sizes
    gmacs = [macs_per_image(config.at_patch_size(size)) / 1e9 for size in ((24, 32), (12, 16))]
    assert gmacs == pytest.approx([0.36, 1.50], abs=0.005)
    assert compared_patch_sizes(get_config("ti", image_size=48, image_scale=(1, 2 / 3))) == [(24, 32), (12, 16), (6, 8)]


@pytest.fixture
def flexible_run(small_variant, few_digits_dir, no_curves):
    """Trains in a folder with two patch sizes, 14 steps an epoch."""

    def run(*flags):
        usual = ["--recipe=digits", f"--data-dir={few_digits_dir}", "--batch-size=16", "--epochs=2", "--workers=0"]
        return train.main.main([*usual, "--patch-sizes", "24,32", "12,16", *map(str, flags)])

    return run


def _median_entropy(data_dir):
    """Of the training pictures, as the model sees them."""
    config = RECIPES["digits"].model_config(10)
    source, transform = open_digits(data_dir).train, eval_transform(config)
    return np.median(grey_entropy(np.stack([transform(source[i])["image"] for i in range(len(source))])))


def test_a_run_draws_a_size_for_each_step_and_goes_on_bit_for_bit(flexible_run, few_digits_dir, tmp_path, capsys):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert flexible_run(f"--output={whole}") == 0
    assert "in patches of 24,32 or 12,16, 10 classes" in capsys.readouterr().out
    shutil.copytree(whole, resumed)
    (last,) = [path for path in (resumed / "checkpoints").iterdir() if path.name == "28"]
    shutil.rmtree(last)
    assert flexible_run(f"--output={resumed}") == 0
    assert "continued after step 14 of 28" in capsys.readouterr().out
    assert (resumed / "weights.safetensors").read_bytes() == (whole / "weights.safetensors").read_bytes()
    assert load_weights(whole).patch_sizes == ((24, 32), (12, 16))
    last = load_weights(f"{whole}:last")
    assert last.patch_sizes == ((24, 32), (12, 16))
    assert last.entropies == (pytest.approx(_median_entropy(few_digits_dir), abs=1e-4),)

    fixed = load_weights(whole / "weights.safetensors", patch_size=(24, 32))
    assert fixed.notes[-1] == "kernels resized from patches of 12 and 16 pixels to 24 and 32"  # trained with them
    convert.save(fixed.tensors, fixed.config, tmp_path / "w.hf", patch_sizes=fixed.patch_sizes)
    assert load_weights(tmp_path / "w.hf").patch_sizes == fixed.patch_sizes
    assert main([f"--weights={whole}", "--patch-size=all", f"--data-dir={few_digits_dir}"]) == 0
    out, error = capsys.readouterr()
    assert [row.split()[0] for row in out.splitlines()[-3:]] == ["patch", "24,32", "12,16"]  # and no others
    assert "lose accuracy" not in error


@pytest.fixture
def task(small_variant):
    config = dataclasses.replace(RECIPES["digits"], batch_size=8, augment_on="host", precision="float32")
    config = dataclasses.replace(config, drop_path=0.0, patch_sizes=("24,32", "12,16", "6,8"))
    return Classification(config, config.model_config(3), ("a", "b", "c"))


def test_the_size_of_a_step_follows_from_seed_and_step(task, monkeypatch):
    def make_train_step(model, variant, optimizer, config):
        return lambda state, batch: (state, {"size": jnp.array(variant.patch_size[0])})

    monkeypatch.setattr(programs, "make_train_step", make_train_step)
    drawn = {}
    for seed in (0, 1):
        config = dataclasses.replace(task.config, seed=seed)
        with closing(Programs(Plan(task, config, make_mesh(), 10), new_state=True)) as compiled:
            state, batch = compiled.new_state(), compiled._batch(8, training=True)
            batch = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), batch)
            sizes = []
            for step in (*range(60), *range(60)):
                state, metrics = compiled.step_after(step)(state, batch)
                sizes.append(int(metrics["size"]))
            _, dearest = compiled.train_step(state, batch)
        assert sizes[:60] == sizes[60:]
        assert int(dearest["size"]) == 6  # what memory is told of
        assert min(map(sizes[:60].count, (24, 12, 6))) >= 10
        drawn[seed] = sizes
    assert drawn[0] != drawn[1]


def test_the_loss_of_each_variant_is_that_of_the_torch_twin_called_with_its_size(task):
    graphdef, params = nnx.split(task.model(dtype=jnp.float32, rngs=nnx.Rngs(0)))
    twin = torch_model(Weights(config=task.model_config, tensors=flatten(params)))
    images = np.random.default_rng(0).standard_normal((8, *task.model_config.image_size, 3), np.float32)
    targets = np.random.default_rng(1).dirichlet(np.ones(3), 8).astype(np.float32)
    batch = {"image": jnp.asarray(images), "targets": jnp.asarray(targets)}
    losses = []
    for variant, size in zip(variants_of(task), ((6, 8), (12, 16), (24, 32)), strict=True):

        @jax.jit
        def loss(params, variant=variant):
            return variant.loss(nnx.merge(graphdef, params), batch, None, rngs=nnx.Rngs(dropout=0))[0]

        with torch.inference_mode():
            logits = twin(torch.tensor(images).permute(0, 3, 1, 2), patch_size=size)
            expected = torch.nn.functional.cross_entropy(logits, torch.tensor(targets)).item()
        losses.append(float(loss(params)))
        assert losses[-1] == pytest.approx(expected, rel=1e-5)
    assert np.ptp(losses) > 1e-3  # else any size would do


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["24,32", "24,32"], "patch_sizes names 24,32 twice"),
        (["24,32", "6,8"], "--patch-sizes must name 12,16 too: that is the model's own, which evaluations take"),
        (["12,16", "10,8"], "--patch-sizes: patch_size 10 does not divide the image of branch 0, 48 x 48 pixels"),
        (["12,16", "24"], "--patch-sizes: patch_size must be 2 whole numbers, one per branch; got (24,)"),
        (["12,16", "24x32"], "argument --patch-sizes: must be pixels, a number for each branch"),
        (["12,16", "24,32", "--qat=int8", "--init=x"], "qat int8 rounds kernels, and patch_sizes resizes them"),
        (["12,16", "--task=detection"], "patch_sizes is no setting of detection"),
    ],
)
def test_sizes_that_cannot_be_drawn_are_refused_before_anything_is_written(
    small_variant, few_digits_dir, tmp_path, capsys, flags, message
):
    folder = tmp_path / "run"
    try:
        status = train.main.main([f"--data-dir={few_digits_dir}", f"--output={folder}", "--patch-sizes", *flags])
    except SystemExit as exit:
        status = exit.code
    error = capsys.readouterr().err
    assert (status, error.count("\n")) == (2, 1)
    assert message in error
    assert not folder.exists()
