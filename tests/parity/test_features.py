"""What users look at besides the logits: pooled features, intermediates, attention maps; and the ways to compute."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import crossvit_jax
import crossvit_torch
from crossvit_jax import attention
from tests.compilation import AS_FOR_USERS
from tests.parity.reference import (
    GRADIENT_BOUND,
    OUTPUT_BOUND,
    abstract,
    channels_last,
    error,
    flax_gradients,
    flax_module,
    flax_twin,
    gradient_errors,
    images,
    perturb,
    timm_model,
    torch_gradients,
    torch_twin,
)

SIZE = 120
SETTINGS = {"image_size": SIZE, "depth": (1, 2)}  # shallow: compiling takes the time
ONE_STAGE = SETTINGS | {"stages": 1}  # where the stages after it would show nothing new
CHOICES = [1, 4, [0], [1, 4], [-1], [5, 0]]  # of intermediates


@pytest.fixture(scope="module")
def reference():
    return timm_model("9-dagger", **SETTINGS)


@pytest.fixture(scope="module")
def twin(reference):
    return torch_twin("9-dagger", reference.state_dict(), "float64", **SETTINGS)


@pytest.fixture(scope="module")
def flax_model(reference):
    with jax.enable_x64(True):
        return flax_twin("9-dagger", reference.state_dict(), "float64", **SETTINGS)


@pytest.fixture
def flax(flax_model):
    with jax.enable_x64(True):
        yield flax_model


def both(twin, flax, method, *args, **kwargs):
    """The results of the same method of both twins on the same images."""
    x = images(SIZE)
    with torch.no_grad():
        expected = getattr(twin, method)(torch.tensor(x), *args, **kwargs)
    graphdef, params = nnx.split(flax)
    run = jax.jit(lambda params, x: getattr(nnx.merge(graphdef, params), method)(x, *args, **kwargs))
    return expected, run(params, jnp.asarray(channels_last(x)))


@pytest.mark.parametrize("norm", [False, True])
def test_intermediates_equal_timms(reference, twin, flax, norm):
    with torch.no_grad():
        last, expected = reference.forward_intermediates(torch.tensor(images(SIZE)), norm=norm)
    for result in both(twin, flax, "forward_intermediates", norm=norm, output_fmt="NCHW"):
        assert max(map(error, result[0], last)) <= OUTPUT_BOUND["float64"]
        assert len(result[1]) == len(expected) == 6
        assert max(map(error, result[1], expected)) <= OUTPUT_BOUND["float64"]


@pytest.fixture(scope="module")
def chosen(twin, flax_model):
    """Both twins' intermediates for each of `CHOICES`; of Flax in one compiled program."""
    x, kwargs = images(SIZE), {"stop_early": True, "output_fmt": "NCHW", "intermediates_only": True}
    graphdef, params = nnx.split(flax_model)

    @jax.jit
    def run(params, x):
        model = nnx.merge(graphdef, params)
        return [model.forward_intermediates(x, indices, **kwargs) for indices in CHOICES]

    with torch.no_grad(), jax.enable_x64(True):
        results = [twin.forward_intermediates(torch.tensor(x), indices, **kwargs) for indices in CHOICES]
        return list(zip(results, run(params, jnp.asarray(channels_last(x))), strict=True))


@pytest.mark.parametrize("choice", range(len(CHOICES)), ids=map(str, CHOICES))
def test_intermediates_are_chosen_as_timm_chooses(reference, chosen, choice):
    with torch.no_grad():
        expected = reference.forward_intermediates(torch.tensor(images(SIZE)), CHOICES[choice], intermediates_only=True)
    for result in chosen[choice]:
        assert len(result) == len(expected)
        assert max(map(error, result, expected)) <= OUTPUT_BOUND["float64"]


def test_intermediates_come_as_maps_or_tokens(twin, flax):
    maps, flax_maps = both(twin, flax, "forward_intermediates", [0, 5], intermediates_only=True)
    assert [tuple(x.shape) for x in maps] == [(2, 128, 10, 10), (2, 256, 7, 7)]  # as timm's are
    assert [x.shape for x in flax_maps] == [(2, 10, 10, 128), (2, 7, 7, 256)]
    for result in both(twin, flax, "forward_intermediates", [0, 5], intermediates_only=True, output_fmt="NLC"):
        assert [tuple(x.shape) for x in result] == [(2, 100, 128), (2, 49, 256)]


def test_maps_of_rectangular_images_have_height_before_width():
    size = (120, 240)
    model = crossvit_torch.create_model("9-dagger", image_size=size).eval()
    maps = model.forward_intermediates(torch.zeros(1, 3, *size), intermediates_only=True)
    assert [tuple(x.shape[2:]) for x in maps] == [(10, 20)] * 3 + [(7, 14)] * 3


def test_rectangular_images_equal_the_torch_twins():
    size = (120, 240)
    settings = ONE_STAGE | {"image_size": size}
    twin = perturb(crossvit_torch.create_model("9-dagger", param_dtype=torch.float64, **settings))
    with jax.enable_x64(True):
        flax = flax_twin("9-dagger", twin.state_dict(), "float64", **settings)
        expected = torch_gradients(twin, [images(size)], "float64")
        result = flax_gradients(flax, [images(size)], "float64", AS_FOR_USERS)
        assert error(result.outputs[0], expected.outputs[0]) <= OUTPUT_BOUND["float64"]
        assert error(result.inputs[0], expected.inputs[0]) <= GRADIENT_BOUND["float64"]
        errors = gradient_errors(result.parameters, expected.parameters)
    assert max(errors.values()) <= GRADIENT_BOUND["float64"], errors


def test_pooled_features_equal_timms(reference, twin, flax):
    with torch.no_grad():
        features = reference.forward_features(torch.tensor(images(SIZE)))
        expected = reference.forward_head(features, pre_logits=True)
        assert error(twin.forward_head(features, pre_logits=True), expected) <= OUTPUT_BOUND["float64"]
    result = flax.forward_head([jnp.asarray(x.numpy()) for x in features], pre_logits=True)
    assert result.shape == (2, flax.num_features)
    assert error(result, expected) <= OUTPUT_BOUND["float64"]


def test_attention_maps_equal_timms_and_have_its_paths(reference, twin, flax):
    expected, hooks = {}, []
    for path, module in reference.named_modules():
        if path.endswith(".attn"):
            module.fused_attn = False  # the fused kernel shows no weights
            hook = module.attn_drop.register_forward_hook
            hooks.append(hook(lambda _, args, __, path=path: expected.__setitem__(path, args[0])))
    with torch.no_grad():
        reference(torch.tensor(images(SIZE)))
    for hook in hooks:
        hook.remove()
    for result in both(twin, flax, "attention_maps"):
        assert result.keys() == expected.keys()
        assert max(error(result[path], expected[path]) for path in expected) <= OUTPUT_BOUND["float64"]
    assert result["blocks.2.blocks.1.0.attn"].shape == (2, 4, 50, 50)
    assert result["blocks.2.fusion.1.attn"].shape == (2, 4, 1, 101)


def test_attention_maps_cost_nothing_when_not_requested(flax):
    # with the fused kernel, no array of (batch, heads, tokens, tokens) is an output of the program
    graphdef, params = nnx.split(flax)
    x = jnp.zeros((2, SIZE, SIZE, 3))
    jaxpr = jax.make_jaxpr(lambda params: nnx.merge(graphdef, params)(x))(params)
    assert [out.aval.shape for out in jaxpr.jaxpr.outvars] == [(2, 1000)]


def test_self_attention_goes_through_dot_product_attention(monkeypatch):
    calls = []
    kernel = attention.dot_product_attention
    monkeypatch.setattr(attention, "dot_product_attention", lambda *a: calls.append(1) or kernel(*a))
    model = abstract("9", image_size=SIZE)
    nnx.eval_shape(lambda m, x: m(x), model, jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32))
    assert len(calls) == 3 * (1 + 3)


def test_only_the_tokens_that_the_head_pools_are_normalised():
    model = abstract("9", image_size=SIZE)
    seen = []
    normalise = type(model)._normalise
    try:
        type(model)._normalise = lambda self, xs: seen.extend(x.shape[1] for x in xs) or normalise(self, xs)
        nnx.eval_shape(lambda m, x: m(x), model, jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32))
    finally:
        type(model)._normalise = normalise
    assert seen == [1, 1]


@pytest.mark.parametrize("framework", ["torch", "flax"])
def test_gradient_checkpointing_leaves_the_gradients_as_they_are(framework):
    twin = perturb(crossvit_torch.create_model("9-dagger", param_dtype=torch.float64, **ONE_STAGE))
    with jax.enable_x64(True):
        model, gradients = {
            "torch": lambda: (twin, torch_gradients),
            "flax": lambda: (
                flax_twin("9-dagger", twin.state_dict(), "float64", **ONE_STAGE),
                partial(flax_gradients, compiler_options=AS_FOR_USERS),
            ),
        }[framework]()
        expected = gradients(model, [images(SIZE)], "float64")
        model.set_grad_checkpointing()
        result = gradients(model, [images(SIZE)], "float64")
    assert error(result.outputs[0], expected.outputs[0]) <= OUTPUT_BOUND["float64"]
    expected = {name: torch.tensor(np.asarray(gradient)) for name, gradient in expected.parameters.items()}
    errors = gradient_errors(result.parameters, expected)
    assert max(e for n, e in errors.items() if not n.endswith("wk.bias")) <= GRADIENT_BOUND["float64"]


BLOCKS = 3 * (1 + 3 + 2)  # of variant 9: every block of both branches, and both fusions of each stage


def test_gradient_checkpointing_keeps_one_tensor_per_block_in_torch(twin):
    def kept(enable: bool) -> int:
        count = 0

        def pack(x):
            nonlocal count
            count += x.numel()
            return x

        twin.set_grad_checkpointing(enable)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            twin(torch.tensor(images(SIZE)))
        return count

    assert kept(True) < 0.5 * kept(False)


def test_gradient_checkpointing_computes_every_block_again_in_flax():
    model = abstract("9", image_size=SIZE)
    x = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        graphdef, params = nnx.split(model)
        loss = jax.grad(lambda params, x, graphdef=graphdef: nnx.merge(graphdef, params)(x).sum())
        jaxpr = jax.make_jaxpr(loss)(params, x)
        assert str(jaxpr).count("remat") == (BLOCKS if enable else 0)


def test_bfloat16_keeps_attention_weights_and_logits_in_float32():
    state_dict = perturb(crossvit_torch.create_model("9-dagger", **ONE_STAGE)).state_dict()
    x = jnp.asarray(channels_last(images(SIZE)), jnp.float32)
    outputs = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        config = crossvit_jax.get_config("9-dagger", **ONE_STAGE)
        model = flax_module(lambda rngs: crossvit_jax.CrossViT(config, dtype=dtype, rngs=rngs), state_dict)  # noqa: B023
        assert {p.dtype for p in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
        graphdef, params = nnx.split(model)

        @jax.jit
        def run(params, x, graphdef=graphdef):
            model = nnx.merge(graphdef, params)
            return model(x), model.forward_features(x), model.attention_maps(x)

        outputs[dtype] = run(params, x)
    logits, features, maps = outputs[jnp.bfloat16]
    assert logits.dtype == jnp.float32
    assert {x.dtype for x in features} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in maps.values()} == {jnp.dtype("float32")}
    assert 0 < error(logits, outputs[jnp.float32][0]) <= 0.05


def test_bfloat16_in_torch_keeps_parameters_and_logits_in_float32():
    full = perturb(crossvit_torch.create_model("9", **SETTINGS))
    half = crossvit_torch.create_model("9", dtype=torch.bfloat16, **SETTINGS).eval()
    half.load_state_dict(full.state_dict())
    x = torch.tensor(images(SIZE), dtype=torch.float32)
    with torch.no_grad():
        result, expected = half(x), full(x)
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    assert result.dtype == torch.float32
    assert 0 < error(result, expected) <= 0.05


@pytest.mark.parametrize(("param_dtype", "bound"), [(torch.float16, 0.005), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("images_dtype", [torch.float32, torch.float64, None])
def test_parameters_in_half_precision_take_images_of_any_and_give_logits_in_float32(param_dtype, bound, images_dtype):
    full = perturb(crossvit_torch.create_model("9", **SETTINGS)).to(param_dtype).float()
    half = crossvit_torch.create_model("9", param_dtype=param_dtype, **SETTINGS).eval()
    half.load_state_dict(full.state_dict())
    x = torch.tensor(images(SIZE)).to(images_dtype or param_dtype)
    with torch.no_grad():
        result, expected = half(x), full(x.float())
        assert half.to(torch.float32)(x).dtype == torch.float32
    assert result.dtype == torch.float32
    assert 0 < error(result, expected) <= bound
