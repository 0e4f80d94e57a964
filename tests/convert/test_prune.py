"""Pruned models: what is cut out, and that they compute what the whole model does with that at zero."""

import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import timm
import torch
from flax import nnx
from PIL import Image
from torch.nn import functional

import convert.changes.prune
from convert import load_flax, load_torch, load_weights, save
from convert.architecture import expected_shapes
from convert.changes.prune import class_labels, prune, pruned_config, worth
from convert.digits import held_out_indices, load_digits
from convert.export.calibration import training_images
from convert.formats.write import write
from convert.tree import flatten
from convert.verify import run_flax
from crossvit_jax.config import get_config
from tests.convert.conftest import TIMM_SETTINGS, refused, run
from tests.parity.reference import GRADIENT_BOUND, error
from tests.small_model import small_detector
from tests.train.small_weights import save_small, small_timm_model

SHARES = {"mlp": (0.25, 0.5), "heads": (0.5, 0.5)}
_BOUND = {"float32": 1e-6, "float64": 1e-12}
_NAMES = "0123456789"
_FEW = ["--calibration-images", 32]


@pytest.fixture(scope="module")
def small_timm():
    return small_timm_model(10)


@pytest.fixture(scope="module")
def pictures():
    """Normalised images, channels last, and labels; the class of the last is not known."""
    return np.random.default_rng(0).standard_normal((3, 48, 48, 3), np.float32), np.array([3, 7, -1], np.int32)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return load_weights(save_small(tmp_path_factory.mktemp("small") / "small.safetensors", _NAMES))


@pytest.fixture(scope="module")
def pruned_file(source, pictures, tmp_path_factory):
    """The small model without three quarters and half of its neurons, and half of its heads."""
    return write(prune(source, SHARES, *pictures), tmp_path_factory.mktemp("pruned") / "pruned.safetensors")


def _kept(whole, pruned):
    """Which rows of a tensor are left, in order."""
    return np.array([np.flatnonzero((whole == row).all(axis=1))[0] for row in pruned])


def _masked(model, source, pruned):
    """timm's model with zeros in the place of what was cut out, and for each block the neurons and heads kept."""
    model, kept = copy.deepcopy(model), {}
    with torch.no_grad():
        for path, block in model.named_modules():
            if not path.endswith((".0", ".1")) or not hasattr(block, "mlp"):
                continue
            names = [f"{path}.mlp.fc1.weight", f"{path}.attn.qkv.weight"]
            neurons, rows = (_kept(source.tensors[name], pruned.tensors[name]) for name in names)
            keeps = torch.zeros(block.mlp.fc2.in_features)
            keeps[neurons] = 1
            block.mlp.fc2.weight *= keeps
            heads = np.unique(rows[: len(rows) // 3] // block.attn.head_dim)
            keeps = torch.zeros(block.attn.num_heads)
            keeps[heads] = 1
            block.attn.proj.weight *= keeps.repeat_interleave(block.attn.head_dim)
            kept[path] = (neurons, heads)
    return model, kept


def test_a_neurons_worth_is_its_activation_times_its_gradient(small_timm, source, pictures):
    images, labels = pictures
    inputs = {}
    for path, module in small_timm.named_modules():
        if path.endswith(("mlp.fc2", "attn.proj")) and "fusion" not in path:
            module.register_forward_pre_hook(lambda _, args, path=path: inputs.update({path: args[0]}))
    expected = {}
    for image, label in zip(images, labels, strict=True):
        logits = small_timm(torch.tensor(image).permute(2, 0, 1)[None])
        target = logits.argmax(1) if label < 0 else torch.tensor([int(label)])
        gradients = torch.autograd.grad(functional.cross_entropy(logits, target), list(inputs.values()))
        for (path, x), gradient in zip(inputs.items(), gradients, strict=True):
            units = (x * gradient).sum(dim=(0, 1)).detach()
            block, _, layer = path.rpartition(".")
            kind = "mlp" if layer == "fc2" else "heads"
            units = units if kind == "mlp" else units.reshape(2, -1).sum(1)
            key = (block.rpartition(".")[0], kind)
            expected[key] = expected.get(key, 0) + units.abs().numpy() / len(images)
    found = worth(source, images, labels)
    assert found.keys() == expected.keys() and len(found) == 4
    for key, values in expected.items():
        np.testing.assert_allclose(found[key], values, rtol=0, atol=1e-5 * values.max())


def test_those_of_most_worth_are_kept_in_their_order(source, pictures, pruned_file):
    found, pruned = worth(source, *pictures), load_weights(pruned_file)
    for branch, (neurons, width) in enumerate([(6, 6), (24, 12)]):
        block = f"blocks.0.blocks.{branch}.0"
        first, second, qkv = (f"{block}.{name}.weight" for name in ("mlp.fc1", "mlp.fc2", "attn.qkv"))
        kept = np.sort(np.argsort(-found[block, "mlp"])[:neurons])
        np.testing.assert_array_equal(pruned.tensors[first], source.tensors[first][kept])
        np.testing.assert_array_equal(pruned.tensors[second], source.tensors[second][:, kept])
        best = int(np.argmax(found[block, "heads"]))
        cut = source.tensors[qkv].reshape(3, 2, width, -1)[:, best]
        np.testing.assert_array_equal(pruned.tensors[qkv].reshape(cut.shape), cut)
    assert pruned.tensors.keys() == source.tensors.keys()


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_both_twins_compute_what_timms_model_does_with_the_rest_at_zero(
    small_timm, source, pictures, pruned_file, precision
):
    pruned = load_weights(pruned_file)
    masked, _ = _masked(small_timm, source, pruned)
    images = torch.tensor(pictures[0]).to(getattr(torch, precision))
    with torch.inference_mode():
        expected = masked.to(images.dtype)(images.permute(0, 3, 1, 2))
        twin = load_torch(pruned_file, param_dtype=images.dtype)(images.permute(0, 3, 1, 2))
    with jax.enable_x64(precision == "float64"):
        flax = run_flax(load_flax(pruned_file, param_dtype=precision), jnp.asarray(images.numpy()))
    assert error(twin, expected) <= _BOUND[precision]
    assert error(flax, expected) <= _BOUND[precision]


def test_gradients_are_those_of_the_masked_model(small_timm, source, pictures, pruned_file):
    pruned = load_weights(pruned_file)
    masked, kept = _masked(small_timm, source, pruned)
    images, direction = torch.tensor(pictures[0]).double(), torch.linspace(-1, 1, 10).double()
    masked = masked.double()
    (masked(images.permute(0, 3, 1, 2)) @ direction).sum().backward()
    with jax.enable_x64(True):
        graphdef, params = nnx.split(load_flax(pruned_file, param_dtype="float64"))

        def total(params):
            return (nnx.merge(graphdef, params)(jnp.asarray(images.numpy())) @ direction.numpy()).sum()

        gradients = flatten(jax.jit(jax.grad(total))(params))
    for path, (neurons, heads) in kept.items():
        block = masked.get_submodule(path)
        ours = {name: gradients[f"{path}.{name}"] for name in ("mlp.fc1.weight", "mlp.fc2.weight", "attn.qkv.weight")}
        assert error(ours["mlp.fc1.weight"], block.mlp.fc1.weight.grad[neurons]) <= GRADIENT_BOUND["float64"]
        assert error(ours["mlp.fc2.weight"], block.mlp.fc2.weight.grad[:, neurons]) <= GRADIENT_BOUND["float64"]
        qkv = block.attn.qkv.weight.grad.unflatten(0, (3, 2, -1))[:, heads].flatten(0, 2)
        assert error(ours["attn.qkv.weight"], qkv) <= GRADIENT_BOUND["float64"]


def test_every_share_of_one_changes_nothing(source, pictures):
    same = prune(source, {"mlp": (1.0,), "heads": (1.0, 1.0)}, *pictures)
    assert (same.config, same.notes) == (source.config, source.notes)
    assert all(np.array_equal(same.tensors[name], array) for name, array in source.tensors.items())


def test_one_share_is_for_the_widest_branch_and_counts_are_rounded():
    weights = dataclasses.replace(_Fake, config=get_config("ti"))
    config = pruned_config(weights, {"mlp": (0.3,), "heads": (0.5,)})
    assert [branch.hidden_dim for branch in config.branches] == [384, 230]  # of 768: 230.4
    assert (config.num_heads, config.head_dim, config.name) == ((3, 2), (None, 64), "custom")
    assert [branch.all_heads for branch in config.branches] == [3, 3]
    assert pruned_config(weights, {"mlp": (0.5, 1)}).branches[0].mlp_ratio == 2


@dataclasses.dataclass(frozen=True)
class _Settings:
    """As much of weights as their settings."""

    config: object = None

    def non_finite(self):
        return None


_Fake = _Settings()


# --- the images ---


def test_labels_are_names_of_folders_that_are_classes():
    names = [("a", "b"), ("cats", "b"), (), ("x", "a")]
    assert class_labels(names, ("b", "a")).tolist() == [1, 0, -1, 1]
    assert class_labels(names, None).tolist() == [-1] * 4


def test_no_digit_and_no_picture_that_is_held_out_is_looked_at(tmp_path):
    config = get_config("ti", image_size=48, image_scale=(1, 2 / 3))
    labels = load_digits()[1]
    images, names = training_images("digits", config, 40)
    training = np.delete(np.arange(len(labels)), held_out_indices(labels))[:40]
    assert len(images) == 40 and names == [(str(label),) for label in labels[training]]
    for split, grey in (("train", 10), ("val", 200)):
        for name in ("cats", "dogs"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (48, 48), (grey,) * 3).save(tmp_path / split / name / "0.png")
    images, names = training_images(str(tmp_path), config, 40)
    assert names == [("cats",), ("dogs",)] and images.max() < 0


# --- files ---


@pytest.fixture
def at_random(monkeypatch):
    """What matters is drawn: to compute it takes seconds."""

    def drawn(weights, images, labels):
        rng, branches = np.random.default_rng(0), weights.config.branches
        return {
            (block, kind): rng.random(number)
            for place, branch in enumerate(branches)
            for block in convert.changes.prune._blocks(weights.config, place)
            for kind, number in (("mlp", branch.hidden_dim), ("heads", branch.num_heads))
        }

    monkeypatch.setattr(convert.changes.prune, "worth", drawn)


@pytest.mark.parametrize("name", ["pruned.pth", "pruned.hf"])
def test_a_model_of_fewer_neurons_is_one_of_timms(capsys, at_random, weights_file, tmp_path, images, name):
    path = tmp_path / name
    status, out, _ = run(capsys, weights_file, path, "--prune", "mlp=0.5", *_FEW)
    assert status == 0
    assert "img_scale=(1, 2/3), mlp_ratio=(4.0, 2.0, 1))" in out
    assert "note        384 of 768 hidden neurons kept in each block of branch 1\n" in out
    assert "note        chosen by 32 images, 32 of them without a label: as what the model takes them for\n" in out
    if name == "pruned.hf":
        assert json.loads((path / "config.json").read_text())["model_args"]["mlp_ratio"] == [4.0, 2.0, 1.0]
        model = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    else:
        model = timm.create_model("crossvit_tiny_240", mlp_ratio=(4, 2, 1), **TIMM_SETTINGS).eval()
        model.load_state_dict(torch.load(path, weights_only=True), strict=True)
    with torch.inference_mode():
        assert error(load_torch(path)(images), model(images)) <= 1e-6
    again = load_weights(path)  # of the .pth, shapes tell
    assert (again.config.name, again.config.mlp_ratio) == ("ti", (4.0, 2.0))


def test_without_some_heads_every_format_keeps_the_model_and_timm_has_none(capsys, at_random, weights_file, tmp_path):
    first = tmp_path / "first.safetensors"
    run(capsys, weights_file, tmp_path / "whole.safetensors")
    status, out, _ = run(capsys, weights_file, first, "--prune", "heads=0.67,mlp=0.125:0.5", *_FEW)
    assert status == 0
    assert "variant     custom; in timm: none\n" in out
    assert "note        2 of 3 heads of self-attention kept in each block of branch 1\n" in out
    weights = load_weights(first)
    for name in ("w.pth", "w.flax.safetensors", "orbax"):
        status, out, _ = run(capsys, first, tmp_path / name)
        again = load_weights(tmp_path / name)  # of the .pth, shapes tell
        assert (status, again.config) == (0, weights.config)
        assert all(np.array_equal(again.tensors[key], array) for key, array in weights.tensors.items())
    status, out, _ = run(capsys, tmp_path / "w.pth", "--info")
    told = "depth=4,num_heads=2,mlp_ratio=2,patch_size=16,image_scale=2/3,head_dim=64"
    assert "branches    embed_dim=96,depth=1,num_heads=3,mlp_ratio=0.5," in out and told in out
    why = "timm has no attention without some of its heads: .safetensors keeps such a model"
    assert why in refused(capsys, first, tmp_path / "w.hf")
    assert b"head_dim" in first.read_bytes() and b"head_dim" not in (tmp_path / "whole.safetensors").read_bytes()
    assert why in refused(capsys, weights_file, tmp_path / "w.hf", "--prune", "heads=0.5")


def test_an_exported_file_is_pruned_too(capsys, small, at_random, tmp_path):
    flags = ["--prune", "mlp=0.5,heads=0.5", "--calibrate", "digits", "--calibration-images", 8]
    status, out, err = run(capsys, small, tmp_path / "model.stablehlo", *flags)
    assert (status, "kept in each block of branch 1" in out) == (0, True), out
    assert "warning: pruned by 8 images: with fewer than 32 that is chance\n" in err
    assert "pruned by digits, and the model has 5 classes" in err


# --- refusals ---


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("mlp=0", "argument --prune: must be mlp=SHARE, heads=SHARE, or both such as mlp=0.5,heads=0.67"),
        ("mlp=1.1", "above 0 and at most 1; got 'mlp=1.1'"),
        ("mlp=nan", "above 0 and at most 1; got 'mlp=nan'"),
        ("mlp", "above 0 and at most 1; got 'mlp'"),
        ("depth=0.5", "above 0 and at most 1; got 'depth=0.5'"),
        ("mlp=0.5,mlp=0.5", "above 0 and at most 1; got 'mlp=0.5,mlp=0.5'"),
        ("heads=0.1", "--prune: heads=0.1 leaves none of the 3 heads of self-attention of branch 1"),
        ("mlp=1:0.0001", "--prune: mlp=0.0001 leaves none of the 768 hidden neurons of branch 1"),
        ("mlp=1:0.5:1", "--prune: mlp takes one share, for the widest branch, or one for each of the 2 branches"),
    ],
)
def test_what_leaves_nothing_or_is_no_share_is_refused(capsys, weights_file, tmp_path, how, why):
    assert why in refused(capsys, weights_file, tmp_path / "out.safetensors", "--prune", how)
    assert not (tmp_path / "out.safetensors").exists()


def test_what_does_not_go_with_it_is_refused_before_any_work(capsys, weights_file, state, tmp_path, monkeypatch):
    monkeypatch.setattr(convert.changes.prune, "worth", None)
    out, empty = tmp_path / "out.safetensors", tmp_path / "empty"
    empty.mkdir()
    flags = ["--prune", "mlp=0.5"]
    assert "empty: no images in it" in refused(capsys, weights_file, out, *flags, "--calibrate", empty)
    assert "none: images come from" in refused(capsys, weights_file, out, *flags, "--calibrate", tmp_path / "none")
    assert "--prune goes by what a trained head says" in refused(capsys, weights_file, out, *flags, "--num-classes", 3)
    assert "--info writes nothing: leave out --prune" in refused(capsys, weights_file, "--info", *flags)
    headless = {name: tensor for name, tensor in state.items() if not name.startswith("head")}
    torch.save(headless, tmp_path / "headless.pth")
    why = "--prune: a model without a head has no loss by which it could be pruned"
    assert why in refused(capsys, tmp_path / "headless.pth", out, *flags)
    state["norm.0.bias"][0] = torch.nan
    torch.save(state, tmp_path / "nan.pth")
    assert "--prune: 1 of " in refused(capsys, tmp_path / "nan.pth", out, *flags)
    assert not out.exists()


def test_detectors_are_refused(capsys, tmp_path):
    config = small_detector()
    tensors = {name: np.zeros(shape, np.float32) for name, shape in expected_shapes(config).items()}
    path = save(tensors, config, tmp_path / "detector.safetensors")
    flags = [tmp_path / "out.safetensors", "--prune", "mlp=0.5"]
    assert "--prune: only classifiers are pruned, and this is a model for detection" in refused(capsys, path, *flags)
