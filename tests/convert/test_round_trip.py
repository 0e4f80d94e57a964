"""to_flax and to_torch: the same tree as the Flax model's, and every bit back."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import timm
import torch
from flax import nnx

from convert import ConversionError, load_flax, to_flax, to_torch
from convert.architecture import expected_shapes, infer_config
from convert.tree import shapes_of
from crossvit_jax import CrossViT
from crossvit_jax.config import TIMM_NAMES, VARIANTS, get_config

_TORCH_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _random_bits(shapes, dtype):
    """Tensors of random bit patterns: NaNs, infinities and subnormal numbers among them."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    some = np.random.default_rng(0).integers(0, 256, 1_000_003 * dtype.itemsize, np.uint8)  # a prime: no shape repeats
    parts = torch.from_numpy(np.resize(some, sum(sizes) * dtype.itemsize)).view(dtype).split(sizes)
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def _bits(tensor):
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def _assert_same_bits(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype, name
        assert torch.equal(_bits(got[name]), _bits(want[name])), name


@pytest.mark.parametrize("name", list(VARIANTS))
def test_every_variant_comes_back_bit_for_bit(name):
    shapes = shapes_of(timm.create_model(TIMM_NAMES[name], device="meta").state_dict())
    assert infer_config(shapes) == get_config(name)
    assert expected_shapes(get_config(name)) == shapes
    for dtype in _TORCH_DTYPES:
        state = _random_bits(shapes, dtype)
        _assert_same_bits(to_torch(to_flax(state)), state)


def test_float64_comes_back_bit_for_bit(timm_model):
    state = _random_bits(shapes_of(timm_model.state_dict()), torch.float64)
    _assert_same_bits(to_torch(to_flax(state)), state)


def test_the_tree_is_that_of_the_flax_model(timm_model):
    state = timm_model.state_dict()
    params = to_flax(state)
    model = nnx.eval_shape(lambda: CrossViT(infer_config(shapes_of(state)), rngs=nnx.Rngs(0)))
    want = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert jax.tree.structure(params) == jax.tree.structure(want)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, want)
    kernel = params["blocks"][0]["blocks"][1][2]["attn"]["qkv"]["kernel"]
    assert np.array_equal(kernel, state["blocks.0.blocks.1.2.attn.qkv.weight"].numpy().T)
    patches = params["patch_embed"][0]["proj"]["kernel"]
    assert np.array_equal(patches, state["patch_embed.0.proj.weight"].permute(2, 3, 1, 0).numpy())


def test_tensors_share_their_memory_both_ways(state):
    params = to_flax(state)
    back = to_torch(params)
    state["head.0.weight"][3, 5] = 7.0
    assert params["head"][0]["kernel"][5, 3] == 7.0
    assert back["head.0.weight"][3, 5] == 7.0


def test_jax_arrays_are_copied_since_torch_could_write_to_them(state):
    params = jax.tree.map(jnp.asarray, to_flax(state))
    back = to_torch(params)
    _assert_same_bits(back, state)
    back["norm.0.weight"].zero_()
    assert params["norm"][0]["scale"].any()


def test_models_and_states_are_taken_like_nested_parameters(weights_file, state):
    model = load_flax(weights_file)
    _assert_same_bits(to_torch(model), state)
    _assert_same_bits(to_torch(nnx.state(model)), state)


def test_numpy_arrays_are_taken_like_tensors(state):
    arrays = {name: tensor.numpy().astype(ml_dtypes.bfloat16) for name, tensor in state.items()}
    _assert_same_bits(to_torch(to_flax(arrays)), {name: tensor.bfloat16() for name, tensor in state.items()})


def test_ibm_names_and_wrapped_names_become_timms(state):
    wrapped = {}
    for name, tensor in state.items():
        for part in ("pos_embed", "cls_token"):
            name = name.replace(f"{part}_", f"{part}.")
        wrapped[f"module._orig_mod.{name}"] = tensor
    assert "module._orig_mod.pos_embed.0" in wrapped
    _assert_same_bits(to_torch(to_flax(wrapped)), state)


def test_two_names_of_one_tensor_are_refused(state):
    state["module.norm.0.bias"] = state["norm.0.bias"]
    with pytest.raises(ConversionError, match=r"module\.norm\.0\.bias"):
        to_flax(state)


@pytest.mark.parametrize("value", [torch.ones(96, dtype=torch.int8), torch.ones(96).to_sparse(), "text", None])
def test_what_is_no_tensor_of_weights_is_refused_by_name(state, value):
    state["norm.0.bias"] = value
    with pytest.raises(ConversionError, match=r"norm\.0\.bias"):
        to_flax(state)
