"""Patches of other sizes than the model's: timm's resized parameters, and timm's model with them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import timm
import torch
from flax import nnx
from timm.layers import resample_abs_pos_embed
from timm.layers.patch_embed import resample_patch_embed
from torch.nn import functional

import crossvit_jax.resize
import crossvit_torch
import crossvit_torch.resize
from convert.tree import flatten
from crossvit_jax.config import get_config
from tests.parity.reference import (
    GRADIENT_BOUND,
    OUTPUT_BOUND,
    abstract,
    channels_last,
    error,
    flax_twin,
    gradient_errors,
    images,
    perturb,
    random_array,
    torch_twin,
)

RESIZED_BOUND = 5e-6  # of timm's, whose pseudo-inverse is one of float32
HEIGHT, WIDTH = 48, 72  # of the image; the second branch sees 32 x 48
SETTINGS = {"image_size": (HEIGHT, WIDTH), "image_scale": (1.0, 2 / 3), "stages": 1, "depth": (1, 1), "num_classes": 7}
OTHER = (8, 8)  # patches instead of 12 and 16: grids of 6 x 9 and 4 x 6 instead of 4 x 6 and 2 x 3
LARGER = (24, 8)


@pytest.mark.parametrize(("size", "new_size"), [(12, 8), (12, 14), (16, 10)])
def test_resized_kernels_equal_timms_and_numpys(size, new_size):
    kernel = random_array(0, 4, 3, size, size)
    timms = resample_patch_embed(torch.tensor(kernel, dtype=torch.float32), [new_size, new_size]).numpy()
    pixels = torch.eye(size**2, dtype=torch.float64).reshape(-1, 1, size, size)
    resized = functional.interpolate(pixels, size=(new_size, new_size), mode="bicubic", antialias=True)
    inverse = np.linalg.pinv(resized.reshape(size**2, -1).T.numpy())
    numpys = (kernel.reshape(12, -1) @ inverse).reshape(4, 3, new_size, new_size)
    for precision, expected, bound in (("float32", timms, RESIZED_BOUND), ("float64", numpys, 1e-12)):
        with jax.enable_x64(precision == "float64"):
            flax = crossvit_jax.resize.resize_kernel(jnp.asarray(kernel.transpose(2, 3, 1, 0), precision), new_size)
            assert error(np.asarray(flax).transpose(3, 2, 0, 1), expected) <= bound
        twin = crossvit_torch.resize.resize_kernel(torch.tensor(kernel.astype(precision)), new_size)
        assert error(twin, expected) <= bound


@pytest.mark.parametrize(("grid", "new_grid"), [((20, 20), (10, 10)), ((14, 14), (16, 16)), ((4, 6), (6, 9))])
def test_resampled_position_embeddings_equal_timms(grid, new_grid):
    embedding = random_array(0, 1, 1 + grid[0] * grid[1], 8).astype(np.float32)
    expected = resample_abs_pos_embed(torch.tensor(embedding), list(new_grid), list(grid))
    flax = crossvit_jax.resize.resample_pos_embed(jnp.asarray(embedding), grid, new_grid)
    assert error(flax, expected) <= RESIZED_BOUND
    assert error(crossvit_torch.resize.resample_pos_embed(torch.tensor(embedding), grid, new_grid), expected) == 0


@pytest.mark.parametrize("new_size", [12, 16, 20, 31])
def test_enlarged_patches_give_what_the_patches_gave(new_size):
    kernel, patch = (random_array(seed, 5, 3, 12, 12) for seed in (0, 1))
    larger = functional.interpolate(torch.tensor(patch), size=(new_size,) * 2, mode="bicubic", antialias=True).numpy()
    new_kernel = crossvit_torch.resize.resize_kernel(torch.tensor(kernel), new_size).numpy()
    assert error((larger * new_kernel).sum((1, 2, 3)), (patch * kernel).sum((1, 2, 3))) <= 1e-13


def timm_at(patch_size) -> torch.nn.Module:
    """timm's model of these settings with the patches given, in float64; its weights are whatever they are."""
    config = get_config("ti", **SETTINGS)
    with torch.device("meta"):
        model = timm.create_model(
            "crossvit_tiny_240",
            img_size=config.image_size,
            img_scale=(1.0, 2 / 3),
            depth=[[1, 1, 0]],
            num_classes=7,
            patch_size=patch_size,
        )
    return perturb(model.to_empty(device="cpu")).double()


@functools.cache
def stored() -> dict[str, torch.Tensor]:
    """Weights for patches of 12 and 16 pixels, of timm."""
    return {name: tensor.detach() for name, tensor in timm_at((12, 16)).named_parameters()}


def at_other(parameters: dict[str, torch.Tensor], patch_size) -> dict[str, torch.Tensor]:
    """Stored parameters for other patches, by torch's resizing and a pseudo-inverse in two dimensions."""
    new = dict(parameters)
    for i, (size, (rows, columns)) in enumerate(zip(patch_size, ((48, 72), (32, 48)), strict=True)):
        kernel, embedding = parameters[f"patch_embed.{i}.proj.weight"], parameters[f"pos_embed_{i}"]
        old = kernel.shape[-1]
        pixels = torch.eye(old**2, dtype=torch.float64).reshape(-1, 1, old, old)
        resized = functional.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True)
        kernel = kernel.flatten(2) @ torch.linalg.pinv(resized.reshape(old**2, -1).T)
        new[f"patch_embed.{i}.proj.weight"] = kernel.unflatten(2, (size, size))
        grid = embedding[:, 1:].transpose(1, 2).unflatten(2, (rows // old, columns // old))
        grid = functional.interpolate(grid, size=(rows // size, columns // size), mode="bicubic", antialias=True)
        new[f"pos_embed_{i}"] = torch.cat([embedding[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
    return new


@functools.cache
def expected():
    """Logits at two other pairs, and the gradients of the stored parameters at the first, all of timm's model."""
    parameters = {name: tensor.clone().requires_grad_() for name, tensor in stored().items()}
    x = torch.tensor(images((HEIGHT, WIDTH)))
    logits = torch.func.functional_call(timm_at(OTHER), at_other(parameters, OTHER), x)
    logits.backward(torch.tensor(random_array(0, *logits.shape)))
    with torch.no_grad():
        larger = torch.func.functional_call(timm_at(LARGER), at_other(stored(), LARGER), x)
    return logits.detach(), larger, {name: parameter.grad for name, parameter in parameters.items()}


def test_the_torch_twin_at_other_patches_is_timms_model_with_them():
    logits, larger, gradients = expected()
    twin = torch_twin("ti", {name: tensor.clone() for name, tensor in stored().items()}, "float64", **SETTINGS)
    x = torch.tensor(images((HEIGHT, WIDTH)))
    result = twin(x, patch_size=OTHER)
    assert error(result, logits) <= OUTPUT_BOUND["float64"]
    result.backward(torch.tensor(random_array(0, *logits.shape)))
    errors = gradient_errors({name: p.grad for name, p in twin.named_parameters()}, gradients)
    assert max(errors.values()) <= GRADIENT_BOUND["float64"], errors
    with torch.no_grad():
        assert error(twin(x, patch_size=LARGER), larger) <= OUTPUT_BOUND["float64"]
        twin.float()
        assert error(twin(x.float(), patch_size=OTHER), logits.float()) <= OUTPUT_BOUND["float32"]
        single = twin(x.float(), OTHER)
        twin.dtype = torch.bfloat16  # autocast: kernels and positions are resized in float32 all the same
        assert error(twin(x.float(), OTHER), single) <= 0.05


def test_the_flax_twin_at_other_patches_is_timms_model_with_them():
    logits, larger, gradients = expected()
    x, d_logits = channels_last(images((HEIGHT, WIDTH))), random_array(0, *logits.shape)
    for precision in ("float64", "float32"):
        with jax.enable_x64(precision == "float64"):
            state = {name: tensor.to(getattr(torch, precision)) for name, tensor in stored().items()}
            graphdef, params = nnx.split(flax_twin("ti", state, precision, **SETTINGS))

            @jax.jit
            def run(params, x, graphdef=graphdef):
                other, vjp = jax.vjp(lambda params: nnx.merge(graphdef, params)(x, patch_size=OTHER), params)
                (d_params,) = vjp(jnp.asarray(d_logits, other.dtype))
                return other, nnx.merge(graphdef, params)(x, patch_size=LARGER), d_params

            *results, d_params = run(params, jnp.asarray(x, precision))
            for result, reference in zip(results, (logits, larger), strict=True):
                assert error(result, reference.to(getattr(torch, precision))) <= OUTPUT_BOUND[precision]
            if precision == "float64":
                errors = gradient_errors(flatten(d_params), gradients)
                assert max(errors.values()) <= GRADIENT_BOUND["float64"], errors


def test_the_models_own_patches_are_the_same_program():
    model = abstract("ti", **SETTINGS)
    x = jax.ShapeDtypeStruct((2, HEIGHT, WIDTH, 3), jnp.float32)
    graphdef, params = nnx.split(model)
    run = [
        jax.jit(lambda params, x, kwargs=kwargs: nnx.merge(graphdef, params)(x, **kwargs)).lower(params, x).as_text()
        for kwargs in ({}, {"patch_size": (12, 16)}, {"patch_size": OTHER})
    ]
    assert run[0] == run[1] != run[2]
    twin = crossvit_torch.create_model("ti", **SETTINGS).eval()
    x = torch.tensor(images((HEIGHT, WIDTH))).float()
    with torch.no_grad():
        assert torch.equal(twin(x), twin(x, patch_size=(12, 16)))


def test_features_and_attention_have_the_other_grids():
    twin, flax = crossvit_torch.create_model("ti", **SETTINGS).eval(), abstract("ti", **SETTINGS)
    flax.eval()
    x, shapes = torch.zeros(1, 3, HEIGHT, WIDTH), jax.ShapeDtypeStruct((1, HEIGHT, WIDTH, 3), jnp.float32)

    def both(method, **kwargs):
        traced = nnx.eval_shape(lambda model, x: getattr(model, method)(x, patch_size=OTHER, **kwargs), flax, shapes)
        with torch.no_grad():
            return getattr(twin, method)(x, patch_size=OTHER, **kwargs), traced

    for tokens in both("forward_features"):
        assert [tuple(x.shape) for x in tokens] == [(1, 1 + 54, 96), (1, 1 + 24, 192)]
    maps, flax_maps = both("forward_intermediates", intermediates_only=True)
    assert [tuple(x.shape) for x in maps] == [(1, 96, 6, 9), (1, 192, 4, 6)]
    assert [x.shape for x in flax_maps] == [(1, 6, 9, 96), (1, 4, 6, 192)]
    for weights in both("attention_maps"):
        assert weights["blocks.0.blocks.0.0.attn"].shape[2:] == (55, 55)
        assert weights["blocks.0.fusion.0.attn"].shape[2:] == (1, 25)


@pytest.mark.parametrize(
    ("variant", "patch_size", "message"),
    [
        ("ti", (25, 32), "patch_size 25 does not divide the image of branch 0, 240 x 240 pixels; these do: 1, 2, 3, 4"),
        ("ti", (24, 30), "patch_size 30 does not divide the image of branch 1, 224 x 224 pixels; these do: 1, 2, 4, 7"),
        ("ti", (24,), "patch_size must be 2 whole numbers, one per branch; got (24,)"),
        ("ti", (24, 0), "patch_size must be 2 whole numbers, one per branch; got (24, 0)"),
        ("9-dagger", (24, 32), "patch_size must stay (12, 16), got (24, 32): three convolutions embed the patches"),
    ],
)
def test_patches_that_cannot_be_are_refused_in_one_line(variant, patch_size, message):
    with pytest.raises(ValueError) as refused:
        get_config(variant).at_patch_size(patch_size)
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


def test_the_models_refuse_them_too():
    flax, twin = abstract("ti", **SETTINGS), crossvit_torch.create_model("ti", **SETTINGS)
    x = jax.ShapeDtypeStruct((1, HEIGHT, WIDTH, 3), jnp.float32)
    message = "patch_size 16 does not divide the image of branch 0, 48 x 72 pixels; these do: 1, 2, 3, 4, 6, 8, 12, 24"
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda model, x: model(x, patch_size=(16, 16)), flax, x)
    with pytest.raises(ValueError, match=message):
        twin(torch.zeros(1, 3, HEIGHT, WIDTH), patch_size=(16, 16))
