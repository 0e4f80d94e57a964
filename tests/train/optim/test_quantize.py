"""Quantisation-aware training: what is rounded and how, gradients, whole runs, and the same numbers with integers."""

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert import load_flax
from convert.errors import SettingsError
from crossvit_jax.layers import Linear
from tests.train.small_weights import save_small, small_config
from tests.train.steps import abstract_classifier, make_train_step
from train.config import TrainConfig
from train.evaluate import main as evaluate
from train.main import main
from train.optim.optimizer import make_optimizer
from train.optim.quantize import fake_quantised, quantised
from train.optim.state import make_state
from train.predict import main as predict

_DIGITS = "0123456789"
_BOUND = {"int8": 127.5, "int4": 7.5}  # the largest number before rounding


class Layer(nnx.Module):
    """One linear layer where those of a transformer are."""

    def __init__(self, width, out):
        self.blocks = nnx.List(
            [nnx.Dict(fc1=Linear(width, out, dtype=None, param_dtype=jnp.float32, rngs=nnx.Rngs(0)))]
        )

    def __call__(self, x):
        return self.blocks[0]["fc1"](x)


def _rounded(x, axis, dtype):
    """To integers and back, with a scale for all along an axis."""
    scale = np.abs(x).max(axis, keepdims=True) / _BOUND[dtype]
    top = int(_BOUND[dtype])
    return np.clip(np.rint(x / scale), -top - 1, top) * scale


def _layer_and_input(tokens, *, out=8):
    """Normal numbers, of which the largest are positive: whether -127.5 becomes -127 or -128 is a matter of luck."""
    layer, rng = Layer(16, out), np.random.default_rng(0)
    kernel, x = (rng.normal(size=size).astype(np.float32) for size in ((16, out), (tokens, 16)))
    kernel[3], x[:, 5] = np.abs(kernel).max(0) + 0.01, np.abs(x).max(1) + 0.01
    layer.blocks[0]["fc1"].kernel[...] = jnp.asarray(kernel)
    return layer, kernel, x


@pytest.fixture
def model(tmp_path):
    """A small model whose every parameter matters, in evaluation mode."""
    return load_flax(save_small(tmp_path / "small.safetensors", _DIGITS))


def _images(count=5):
    return jax.random.normal(jax.random.key(0), (count, 48, 48, 3))


def _call(model, images):
    graphdef, state = nnx.split(model)
    return np.asarray(jax.jit(lambda state, images: nnx.merge(graphdef, state)(images))(state, images))


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_layer_multiplies_rounded_weights_and_tokens(dtype):
    layer, kernel, x = _layer_and_input(6)
    expected = _rounded(x, -1, "int8") @ _rounded(kernel, 0, dtype)
    got = _call(fake_quantised(layer, dtype), x)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert np.abs(got - x @ kernel).max() > 1e-4


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_gradients_pass_straight_through_the_rounding(dtype):
    layer, kernel, x = _layer_and_input(6)
    weight = np.random.default_rng(1).normal(size=(6, 8)).astype(np.float32)
    graphdef, state = nnx.split(fake_quantised(layer, dtype))
    d_state, d_x = jax.grad(lambda s, x: (nnx.merge(graphdef, s)(x) * weight).sum(), argnums=(0, 1))(state, x)
    got = np.asarray(d_state["blocks"][0]["fc1"]["kernel"][...])
    np.testing.assert_allclose(got, _rounded(x, -1, "int8").T @ weight, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(d_x, weight @ _rounded(kernel, 0, dtype).T, rtol=1e-4, atol=1e-6)


def test_the_linear_layers_of_the_transformer_are_rounded_and_nothing_else(model):
    graphdef, state = nnx.split(fake_quantised(model, "int4"))
    program = jax.make_jaxpr(lambda state, images: nnx.merge(graphdef, state)(images))(state, _images())
    folded = ("wk", "wv")
    paths = [path for path, module in nnx.iter_modules(model) if isinstance(module, Linear) and path[-1] not in folded]
    expected = [path for path in paths if path[0] == "blocks"]
    assert len(expected) == len(paths) - 2  # the two heads
    assert str(program).count("preferred_element_type=int32") == len(expected)

    held = {path[:-3] for path, leaf in nnx.to_flat_state(nnx.state(quantised(model, "int4"))) if path[-1] == "qvalue"}
    assert held == set(expected)

    model.set_attention("tpu")  # which multiplies without calling the layer
    try:
        graphdef, state = nnx.split(fake_quantised(model, "int4"))
    finally:
        model.set_attention("xla")
    as_for_tpus = jax.make_jaxpr(lambda state, images: nnx.merge(graphdef, state)(images))(state, _images())
    assert str(as_for_tpus) == str(program)


def test_parameters_keep_their_names_and_values(model):
    copy = fake_quantised(model, "int4")
    jax.tree.map(np.testing.assert_array_equal, *(nnx.to_pure_dict(nnx.state(m, nnx.Param)) for m in (model, copy)))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_integers_give_what_training_gave(tmp_path, dtype, precision):
    model, images = load_flax(save_small(tmp_path / "small.safetensors", _DIGITS), dtype=precision), _images()
    plain, trained = _call(model, images), _call(fake_quantised(model, dtype), images)
    np.testing.assert_allclose(_call(quantised(model, dtype), images), trained, atol=1e-5 * np.abs(plain).max())
    errors = {"int8": (1e-4, 0.1), "int4": (0.02, 1.0)}
    assert errors[dtype][0] < np.abs(trained - plain).max() / np.abs(plain).max() < errors[dtype][1]


def test_as_many_tokens_as_a_layer_has_inputs_are_not_taken_for_its_weights():
    layer, kernel, x = _layer_and_input(16, out=16)  # by itself, qwix takes what has the shape of the weights for them
    got = _call(fake_quantised(layer, "int4"), x.reshape(1, 16, 16))
    np.testing.assert_allclose(got[0], _rounded(x, -1, "int8") @ _rounded(kernel, 0, "int4"), rtol=1e-4, atol=1e-5)


def _step(model, **settings):
    """The loss of a step of training, and the parameters after it."""
    plain = {"mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0, "optimizer": "sgd", "epochs": 1, "warmup_epochs": 0}
    config = TrainConfig(**plain, batch_size=4, init="x", **settings)
    abstract = abstract_classifier(dataclasses.replace(small_config(10), drop_path_rate=0.0), config)
    optimizer = make_optimizer(config, steps_per_epoch=1)
    state = make_state(nnx.to_pure_dict(nnx.state(model, nnx.Param)), optimizer, config)
    batch = {"image": _images(4), "label": jnp.arange(4, dtype=jnp.int32)}
    state, metrics = jax.jit(make_train_step(abstract, optimizer, config))(state, batch)
    return float(metrics["loss"]), state["params"]


@pytest.mark.parametrize("changes", [{"grad_checkpointing": True}, {"grad_accum": 2}])
def test_what_saves_memory_takes_the_same_step(model, changes):
    plain, _ = _step(model)
    whole, params = _step(model, qat="int4")
    other, other_params = _step(model, qat="int4", **changes)
    assert abs(whole - plain) > 1e-3
    assert other == pytest.approx(whole, rel=1e-5)
    kernel, other_kernel = (p["blocks"][0]["blocks"][0][0]["mlp"]["fc1"]["kernel"] for p in (params, other_params))
    np.testing.assert_allclose(other_kernel, kernel, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "bound"), [("int8", 0.15), ("int4", 0.3)])
def test_bfloat16_takes_nearly_the_step_of_float32(model, dtype, bound):
    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    losses, moves = [], []
    for precision in ("float32", "bfloat16"):
        loss, params = _step(model, qat=dtype, precision=precision, lr=1.0)
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
        losses.append(loss)
        moves.append(np.concatenate(jax.tree.leaves(jax.tree.map(lambda a, b: np.ravel(a - b), params, before))))
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    # what bfloat16 changes in the last place is now and then rounded to another integer
    assert 0 < np.linalg.norm(moves[1] - moves[0]) < bound * np.linalg.norm(moves[0])


def test_a_run_trains_and_evaluates_with_rounded_weights_and_leaves_float_ones(
    small_variant, few_digits_dir, no_curves, tmp_path, capsys
):
    init = save_small(tmp_path / "init.safetensors", _DIGITS)
    flags = [f"--data-dir={few_digits_dir}", "--epochs=1", "--batch-size=56", f"--init={init}", "--augment-on=device"]
    assert main([*flags, "--qat=int4", f"--output={tmp_path / 'run'}"]) == 0
    out = capsys.readouterr().out
    assert "weights rounded to int4" in out
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["qat"] == "int4"
    told = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][-1]

    results = {}
    for quantize in (None, "int4"):
        folder = tmp_path / f"evaluation-{quantize}"
        more = [f"--quantize={quantize}"] if quantize else []
        command = [f"--weights={tmp_path / 'run'}", "--dataset=digits", f"--data-dir={few_digits_dir}", *more]
        assert evaluate([*command, f"--output={folder}", "--batch-size=56"]) == 0
        results[quantize] = json.loads((folder / "evaluation.json").read_text())
        assert results[quantize]["quantize"] == quantize
    told, rounded, floats = (
        [of[prefix + name] for name in ("loss", "top1", "top5")]
        for prefix, of in (("eval/", told), ("", results["int4"]), ("", results[None]))
    )
    assert rounded == pytest.approx(told, rel=1e-5)
    # one alone may be the same by chance: rounding moves the mean loss of a model that has learnt little either way
    assert floats != pytest.approx(told, rel=1e-4)

    # the run goes on as it was begun, and in no other way
    assert main([f"--resume={tmp_path / 'run'}"]) == 0
    capsys.readouterr()
    assert main([*flags, f"--output={tmp_path / 'run'}"]) == 2
    assert "qat was 'int4' and is None" in capsys.readouterr().err


@pytest.mark.parametrize(("dtype", "precision"), [("int8", "float32"), ("int4", "float32"), ("int4", "bfloat16")])
def test_predictions_are_those_of_the_integers_that_are_evaluated(image_folder, capsys, dtype, precision):
    weights = save_small(image_folder() / "w.safetensors", "abc")
    for i in range(12):
        image_folder(f"pictures/{'abc'[i % 3]}/{i}.png", seed=i)
    pictures, evaluation = image_folder() / "pictures", image_folder() / "evaluation"
    flags = [f"--weights={weights}", f"--precision={precision}", "--batch-size=4"]
    data = [f"--dataset=folder:{pictures}", "--split=all", f"--output={evaluation}"]

    def losses(*more):
        """Of each image; and the number of images that get their own class."""
        capsys.readouterr()
        assert predict([*flags, *more, "--format=jsonl", str(pictures)]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        own = [
            {p["class"]: p["probability"] for p in line["predictions"]}[line["path"].split("/")[-2]] for line in lines
        ]
        right = sum(line["predictions"][0]["probability"] == p for line, p in zip(lines, own, strict=True))
        return -np.log(own), right

    predicted, right = losses(f"--quantize={dtype}")
    assert evaluate([*flags, *data, f"--quantize={dtype}"]) == 0
    told = json.loads((evaluation / "evaluation.json").read_text())
    assert predicted.mean() == pytest.approx(told["loss"], rel=1e-4)
    assert right == pytest.approx(12 * told["top1"] / 100)
    # of each image: rounding moves their mean either way, and hardly for int8
    difference = np.abs(predicted - losses()[0]).max()
    assert difference > 3e-3, difference


def test_fresh_weights_are_refused(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--qat=int4"])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "--init" in error
    assert error.count("\n") == 1


def test_other_types_are_refused():
    with pytest.raises(SettingsError, match="qat must be int8 or int4; got int2"):
        TrainConfig(qat="int2", init="x")


def test_without_qwix_the_extra_is_named(monkeypatch, capsys, small_variant, digits_dir, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "qwix" else find_spec(name, *rest)
    )
    init = save_small(tmp_path / "init.safetensors", _DIGITS)
    output = tmp_path / "run"
    assert main(["--qat=int4", f"--init={init}", f"--data-dir={digits_dir}", f"--output={output}"]) == 2
    assert evaluate([f"--weights={init}", "--dataset=digits", f"--data-dir={digits_dir}", "--quantize=int8"]) == 2
    assert predict(["--weights=/nowhere", "--quantize=int4", str(init)]) == 2
    errors = capsys.readouterr().err.splitlines()
    flags = ("--qat", "--quantize", "--quantize")
    assert all(flag in error for error, flag in zip(errors, flags, strict=True))
    assert all("pip install -e '.[qat]'" in error for error in errors)
    assert not output.exists()
