"""Ready models of either twin: timm's logits, in evaluation mode, owning their parameters."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from convert import load_flax, load_torch, load_weights, save
from convert.verify import run_flax


def _flax_logits(model, images):
    return torch.from_numpy(np.array(run_flax(model, jnp.asarray(images.permute(0, 2, 3, 1).numpy()))))


def test_both_twins_give_timms_logits(weights_file, images, logits):
    flax = _flax_logits(load_flax(weights_file), images)
    with torch.inference_mode():
        twin = load_torch(weights_file)(images)
    for got in (flax, twin):
        assert (got - logits).abs().max() <= 1e-5 * logits.abs().max()


def test_models_are_in_evaluation_mode(weights_file):
    rates = {"drop_path_rate": 0.5, "drop_rate": 0.5, "pos_drop_rate": 0.5, "attn_drop_rate": 0.5}
    model = load_flax(weights_file, **rates)
    # in training mode, this call would ask for random numbers
    assert nnx.eval_shape(model, jnp.zeros((1, 48, 48, 3))).shape == (1, 10)
    assert not load_torch(weights_file, **rates).training


def test_parameters_are_float32_unless_told_otherwise(tmp_path, weights_file):
    weights = load_weights(weights_file).astype(np.float16)
    half = save(weights.tensors, weights.config, tmp_path / "half.safetensors")
    assert load_flax(half).norm[0].scale[...].dtype == jnp.float32
    assert load_torch(half).norm[0].weight.dtype == torch.float32
    flax = load_flax(half, param_dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in map(jnp.asarray, _leaves(flax))} == {jnp.dtype("bfloat16")}
    assert {p.dtype for p in load_torch(half, param_dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_the_compute_dtype_is_passed_on(weights_file):
    assert load_flax(weights_file, dtype=jnp.bfloat16).dtype == jnp.bfloat16
    assert load_torch(weights_file, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_loaded_flax_model_is_all_arrays(weights_file):
    model = load_flax(weights_file)
    assert all(isinstance(leaf, jnp.ndarray) for leaf in _leaves(model))
    assert load_flax(weights_file) is not model


def test_models_own_their_parameters(weights_file):
    first, second = load_torch(weights_file), load_torch(weights_file)
    with torch.no_grad():
        first.norm[0].weight.zero_()
    assert second.norm[0].weight.any()
    assert all(parameter.requires_grad and parameter.is_contiguous() for parameter in first.parameters())


def test_nan_and_infinite_weights_are_counted_in_a_warning(tmp_path, state, caplog):
    state["head.0.bias"][2] = torch.nan
    state["blocks.0.blocks.0.0.mlp.fc1.weight"][0, :3] = torch.inf
    path = tmp_path / "nan.pth"
    torch.save(state, path)
    load_flax(path)
    assert "4 of 6,653,972" in caplog.text
    assert "weights are NaN or infinite" in caplog.text
    assert "head.0.bias (1)" in caplog.text
    assert "blocks.0.blocks.0.0.mlp.fc1.weight (3)" in caplog.text


def test_overflow_of_half_precision_is_counted(weights_file):
    weights = load_weights(weights_file)
    weights.tensors["norm.0.bias"][0] = 1e6
    assert weights.non_finite() is None
    assert "1 of" in weights.astype(np.float16).non_finite()


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import convert", {"jax", "torch", "numpy"}),
        ("import convert; convert.load_flax({path!r})", {"torch", "crossvit_torch", "orbax"}),
        # torch's compiler, which takes more than a second
        ("import convert; convert.load_torch({path!r})", {"torch._dynamo", "sympy", "timm"}),
    ],
)
def test_only_what_is_needed_is_imported(tmp_path, weights_file, code, absent):
    weights = load_weights(weights_file)
    path = str(save(weights.tensors, weights.config, tmp_path / "w.safetensors"))
    code = code.format(path=path) + f"; import sys; print(sorted({absent!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def _leaves(model):
    import jax

    return jax.tree.leaves(nnx.state(model))
