"""The weights of `--qat`, quantised by torchao in the PyTorch twin: the same layers and classes as with qwix in JAX."""

import csv

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from PIL import Image
from sklearn.datasets import load_digits

from convert import load_weights, save
from convert.__main__ import main as convert
from convert.digits import held_out_indices
from convert.export.compare import photographs
from convert.export.torchao import is_quantised, load_torchao, quantised_twin
from convert.models import flax_model
from convert.verify import run_flax
from crossvit_jax.config import VARIANTS
from crossvit_jax.preprocess import preprocess_image
from crossvit_torch import create_model
from tests.train.small_weights import save_small
from train.evaluate import main as evaluate
from train.main import main
from train.optim.quantize import quantised

pytest.importorskip("torchao")

_DIGITS = "0123456789"
_TOP = {"int8": 127, "int4": 7}


@pytest.fixture
def weights(tmp_path):
    return load_weights(save_small(tmp_path / "small.safetensors", _DIGITS))


def _run_torch(model, images):
    with torch.inference_mode():
        return model(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_the_layers_and_integers_are_those_of_qwix(weights, scheme):
    leaves = nnx.to_flat_state(nnx.state(quantised(flax_model(weights), scheme)))
    theirs = {
        ".".join(map(str, path[:-3])): np.asarray(leaf[...]).astype(int).T
        for path, leaf in leaves
        if path[-1] == "qvalue"
    }
    ours = {
        name: module.weight
        for name, module in quantised_twin(weights, scheme).named_modules()
        if is_quantised(module, name)
    }
    assert set(ours) == set(theirs)
    for name, weight in ours.items():
        values, scale = weight.qdata.numpy().astype(int), weight.scale.numpy()
        original = weights.tensors[f"{name}.weight"]
        np.testing.assert_allclose(scale, np.abs(original).max(1, keepdims=True) / (_TOP[scheme] + 0.5), rtol=1e-6)
        # The largest weight of an output lies halfway between two integers. Where it is negative, both are within the
        # range, and the last bit of the scale decides.
        other = values != theirs[name]
        assert (values[other] + theirs[name][other] == -2 * _TOP[scheme] - 1).all()


@pytest.mark.parametrize(("scheme", "bound"), [("int8", 0.04), ("int4", 0.2)])
def test_the_logits_are_those_of_qwix_but_for_the_rounding(weights, scheme, bound):
    images = photographs(weights.config, 32)
    plain = np.asarray(run_flax(flax_model(weights), jnp.asarray(images)))
    model = quantised(flax_model(weights), scheme)
    expected = np.asarray(run_flax(model, jnp.asarray(images)))
    got = _run_torch(quantised_twin(weights, scheme), images)

    def apart(a):
        return np.sqrt(np.mean((a - expected) ** 2)) / plain.std()

    assert apart(got) < bound
    # no bound can be that of float32: qwix's own logits move with the last bits of the images
    noise = 1e-6 * np.random.default_rng(0).standard_normal(images.shape)
    moved = np.asarray(run_flax(model, jnp.asarray((images * (1 + noise)).astype(np.float32))))
    assert apart(moved) > 1e-3


@pytest.mark.slow
def test_one_command_quantises_a_run_which_predicts_what_it_predicted(monkeypatch, digits_dir, tmp_path, capsys):
    """The classes on the held-out digits are those of the run's own rounded evaluation."""
    small = {"embed_dim": (48, 96), "depth": (1, 1), "num_heads": (2, 2), "mlp_ratio": (2.0, 2.0), "stages": 1}
    monkeypatch.setitem(VARIANTS, "ti", VARIANTS["ti"].replace(**small))
    torch.manual_seed(0)
    model = create_model("ti", image_size=24, image_scale=(1.0, 2 / 3), num_classes=10)
    init = save(model.state_dict(), model.config, tmp_path / "init.safetensors", class_names=_DIGITS)
    run, evaluation, file = (tmp_path / name for name in ("run", "evaluation", "model.pt"))
    flags = [f"--init={init}", "--image-size=24", "--epochs=6", "--warmup-epochs=0", "--lr=3e-3", "--qat=int4"]
    assert main([f"--data-dir={digits_dir}", *flags, f"--output={run}"]) == 0
    data = ["--dataset=digits", f"--data-dir={digits_dir}"]
    assert evaluate([f"--weights={run}", *data, "--quantize=int4", f"--output={evaluation}"]) == 0
    assert convert([str(run), str(file), "--quantize", "int4", "--compare", "digits"]) == 0
    assert "on 64 digits its logits differ" in capsys.readouterr().out

    digits = load_digits()
    held_out = held_out_indices(digits.target)
    model = load_torchao(file)
    pixels = np.round(digits.images[held_out] * (255 / 16)).astype(np.uint8)
    images = [preprocess_image(Image.fromarray(one), model.config) for one in pixels]
    predicted = _run_torch(model, np.stack(images)).argmax(1)
    confusion = np.zeros((10, 10), int)
    np.add.at(confusion, (digits.target[held_out], predicted), 1)
    with (evaluation / "confusion.csv").open() as rows:
        told = np.array([row[1:] for row in csv.reader(rows)][1:], int)
    assert np.trace(told) > 0.8 * told.sum()
    integers = quantised(flax_model(load_weights(run)), "int4")
    expected = np.asarray(run_flax(integers, jnp.asarray(np.stack(images)))).argmax(1)
    # of 359; none where this was written, but another machine may train other weights
    assert (predicted != expected).sum() <= 1
    assert np.abs(confusion - told).sum() <= 2
