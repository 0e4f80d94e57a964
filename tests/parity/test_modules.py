"""Each module alone: the torch twin against timm's module, and Flax against the torch twin. Outputs and gradients."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import jax
import numpy as np
import pytest
import timm.layers
import timm.models.crossvit as timm_crossvit
import torch
from flax import nnx
from timm.models.vision_transformer import Block

from crossvit_jax import attention, blocks, get_config, patch_embed
from crossvit_jax.layers import Conv, LayerNorm, OutputConv
from crossvit_torch import attention as torch_attention
from crossvit_torch import blocks as torch_blocks
from crossvit_torch import patch_embed as torch_patch_embed
from tests.parity.reference import (
    GRADIENT_BOUND,
    OUTPUT_BOUND,
    TimmReduced,
    TimmReducedPatches,
    TimmSeparable,
    error,
    flax_gradients,
    flax_module,
    gradient_errors,
    images,
    perturb,
    random_array,
    torch_gradients,
)

layer_norm = partial(torch.nn.LayerNorm, eps=1e-6)
TOKENS = [random_array(1, 3, 13, 24)]
STAGE = get_config("9")
GRID = (4, 6)  # of patches whose keys are reduced


@dataclass
class Case:
    timm: Callable  # builds timm's module
    torch: type
    flax: type
    args: tuple
    kwargs: dict = field(default_factory=dict)
    inputs: list[np.ndarray] = field(default_factory=lambda: TOKENS)


def embed(patch_size: int, size: tuple[int, int], channels: int, multi_conv: bool) -> Case:
    return Case(
        lambda: timm_crossvit.PatchEmbed(size, patch_size, channels, 24, multi_conv=multi_conv),
        torch_patch_embed.PatchEmbed,
        patch_embed.PatchEmbed,
        (patch_size, channels, 24),
        {"multi_conv": multi_conv},
        [images(size, channels=channels)],
    )


def attention_case(name: str, timm_class: type, qkv_bias: bool) -> Case:
    return Case(
        lambda: timm_class(24, 3, qkv_bias=qkv_bias),
        getattr(torch_attention, name),
        getattr(attention, name),
        (24, 3),
        {"qkv_bias": qkv_bias},
    )


class FlaxForTpus(blocks.Block):
    """In the order that suits TPUs."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.set_attention("tpu")


def block_case(flax_class: type, *, qkv_bias: bool = True) -> Case:
    return Case(
        lambda: Block(24, 3, 4.0, qkv_bias=qkv_bias, norm_layer=layer_norm),
        torch_blocks.Block,
        flax_class,
        (24, 3, 4.0),
        {"qkv_bias": qkv_bias},
    )


def separable_case(qkv_bias: bool) -> Case:
    return Case(
        lambda: TimmSeparable(24, qkv_bias=qkv_bias),
        torch_attention.SeparableAttention,
        attention.SeparableAttention,
        (24,),
        {"qkv_bias": qkv_bias},
    )


class TorchReduced(torch_attention.SpatialReductionAttention):
    """Over a grid of its own."""

    def forward(self, x):
        return super().forward(x, GRID)


class FlaxReduced(attention.SpatialReductionAttention):
    """The same."""

    def __call__(self, x):
        return super().__call__(x, GRID)


class TorchReducedPatches(torch_attention.SpatialReductionAttention):
    """Without the class token, which timm's does not have."""

    def forward(self, x):
        q, k, v = self.per_head(torch.cat([x[:, :1], x], dim=1), GRID)
        return self.attend(q[:, :, 1:], k[:, :, 1:], v[:, :, 1:])


class FlaxReducedPatches(attention.SpatialReductionAttention):
    """The same."""

    def __call__(self, x):
        q, k, v = self.per_head(jax.numpy.concatenate([x[:, :1], x], axis=1), GRID)
        return self.attend(q[:, 1:], k[:, 1:], v[:, 1:])


def reduced_case(timm_class: type, torch_class: type, flax_class: type, qkv_bias: bool) -> Case:
    tokens = GRID[0] * GRID[1] + (timm_class is TimmReduced)
    return Case(
        lambda: timm_class(24, 3, 2, GRID, qkv_bias=qkv_bias),
        torch_class,
        flax_class,
        (24, 3, 2),
        {"qkv_bias": qkv_bias},
        [random_array(1, 3, tokens, 24)],
    )


class TorchStage(torch_blocks.MultiScaleBlock):
    """Without the sizes of the tokens, which timm's does not have."""

    def forward(self, xs):
        return super().forward(xs)[0]


class FlaxStage(blocks.MultiScaleBlock):
    """The same."""

    def __call__(self, xs):
        return super().__call__(xs)[0]


CASES = {
    "PatchEmbed-12": embed(12, (48, 72), 3, multi_conv=False),
    "PatchEmbed-16": embed(16, (48, 80), 1, multi_conv=False),
    "PatchEmbed-12-three-convolutions": embed(12, (48, 72), 3, multi_conv=True),
    "PatchEmbed-16-three-convolutions": embed(16, (48, 80), 1, multi_conv=True),
    "Attention": attention_case("Attention", timm.layers.Attention, qkv_bias=True),
    "Attention-without-bias": attention_case("Attention", timm.layers.Attention, qkv_bias=False),
    "SeparableAttention": separable_case(qkv_bias=True),
    "SeparableAttention-without-bias": separable_case(qkv_bias=False),
    "SpatialReductionAttention": reduced_case(TimmReduced, TorchReduced, FlaxReduced, qkv_bias=True),
    "SpatialReductionAttention-without-bias": reduced_case(TimmReduced, TorchReduced, FlaxReduced, qkv_bias=False),
    "SpatialReductionAttention-without-class-token": reduced_case(
        TimmReducedPatches, TorchReducedPatches, FlaxReducedPatches, qkv_bias=True
    ),
    "CrossAttention": attention_case("CrossAttention", timm_crossvit.CrossAttention, qkv_bias=True),
    "CrossAttention-without-bias": attention_case("CrossAttention", timm_crossvit.CrossAttention, qkv_bias=False),
    "Mlp": Case(lambda: timm.layers.Mlp(24, 72), torch_blocks.Mlp, blocks.Mlp, (24, 72)),
    "Block": block_case(blocks.Block),
    "Block-for-TPUs": block_case(FlaxForTpus),
    "Block-for-TPUs-without-bias": block_case(FlaxForTpus, qkv_bias=False),
    "CrossAttentionBlock": Case(
        lambda: timm_crossvit.CrossAttentionBlock(24, 3, qkv_bias=True, norm_layer=layer_norm),
        torch_blocks.CrossAttentionBlock,
        blocks.CrossAttentionBlock,
        (24, 3),
    ),
    "MultiScaleBlock": Case(
        lambda: timm_crossvit.MultiScaleBlock(
            dim=STAGE.embed_dim,
            patches=(20, 9),
            depth=(*STAGE.depth, 0),
            num_heads=STAGE.num_heads,
            mlp_ratio=(*STAGE.mlp_ratio, 1),
            qkv_bias=True,
            drop_path=[0.0] * max(STAGE.depth),
            norm_layer=layer_norm,
        ),
        TorchStage,
        FlaxStage,
        (STAGE, [0.0] * max(STAGE.depth)),
        inputs=[random_array(1, 2, 21, STAGE.embed_dim[0]), random_array(2, 2, 10, STAGE.embed_dim[1])],
    ),
}


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_equal_timms(name, precision):
    case, dtype = CASES[name], getattr(torch, precision)
    reference = perturb(case.timm()).to(dtype)
    twin = case.torch(*case.args, param_dtype=dtype, **case.kwargs).eval()
    twin.load_state_dict(reference.state_dict(), strict=True)
    expected = torch_gradients(reference, case.inputs, precision)
    check(torch_gradients(twin, case.inputs, precision), expected, precision)
    with jax.enable_x64(precision == "float64"):
        flax = flax_module(
            lambda rngs: case.flax(*case.args, param_dtype=precision, rngs=rngs, **case.kwargs), twin.state_dict()
        )
        check(flax_gradients(flax, case.inputs, precision), expected, precision)


def check(result, expected, precision):
    outputs = map(error, result.outputs, expected.outputs)
    inputs = map(error, result.inputs, expected.inputs)
    parameters = gradient_errors(result.parameters, expected.parameters)
    assert max(outputs) <= OUTPUT_BOUND[precision]
    assert max(inputs) <= GRADIENT_BOUND[precision]
    assert max(parameters.values()) <= GRADIENT_BOUND[precision], parameters


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("height", [24, 35])  # what is left over at the border is not seen
def test_patches_have_the_gradients_of_a_plain_convolution(height, platform, monkeypatch):
    if platform == "tpu":  # what would run there
        monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, default, **_: default(*args))
    layer = Conv(3, 8, 12, stride=12, padding=0, dtype=None, param_dtype=np.float32, rngs=nnx.Rngs(0))
    other = nnx.clone(layer)
    other.conv_general_dilated = jax.lax.conv_general_dilated
    picture = random_array(2, 2, height, 36, 3)

    def loss(layer, picture):
        return jax.numpy.sin(layer(picture)).sum()

    ours, plain = (jax.tree.leaves(nnx.grad(loss, argnums=(0, 1))(conv, picture)) for conv in (layer, other))
    for mine, expected in zip(ours, plain, strict=True):
        np.testing.assert_allclose(mine, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    monkeypatch.undo()
    # training takes no gradient of pictures: what it would need is not even traced
    lowered = nnx.jit(nnx.grad(loss)).trace(layer, picture).lower(lowering_platforms=(platform,)).as_text()
    assert lowered.count("stablehlo.convolution") == {"cpu": 1, "tpu": 2}[platform]


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("out_chans, side, by_hand", [(2, 5, True), (16, 5, False), (16, 20, True)])
def test_a_convolution_that_keeps_the_size_has_the_gradients_of_a_plain_one(
    out_chans, side, by_hand, size, platform, monkeypatch
):
    if platform == "tpu":
        monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, default, **_: default(*args))
    layer = OutputConv(16, out_chans, size, dtype=None, param_dtype=np.float32, rngs=nnx.Rngs(0))
    other = nnx.clone(layer)
    other.set_forward_mode(True)
    maps = random_array(2, 2, side, side + 4, 16)

    def loss(layer, maps):
        return jax.numpy.sin(layer(maps)).sum()

    ours, plain = (jax.tree.leaves(nnx.grad(loss, argnums=(0, 1))(conv, maps)) for conv in (layer, other))
    for mine, expected in zip(ours, plain, strict=True):
        np.testing.assert_allclose(mine, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    monkeypatch.undo()
    lowered = nnx.jit(nnx.grad(loss)).trace(layer, maps).lower(lowering_platforms=(platform,)).as_text()
    # forward, and the kernel's gradient
    assert lowered.count("stablehlo.convolution") == (1 if by_hand and platform == "cpu" else 2)


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_the_gradient_of_a_norm_reads_its_statistics_on_gpus(platform):
    """There XLA would compute mean and deviation again in each of its kernels."""
    layer = LayerNorm(24, dtype=None, param_dtype=np.float32, rngs=nnx.Rngs(0))
    gradient = nnx.jit(nnx.grad(lambda layer, x: jax.numpy.sin(layer(x)).sum(), argnums=(0, 1)))
    program = gradient.trace(layer, TOKENS[0]).lower(lowering_platforms=(platform,)).as_text()
    assert program.count("stablehlo.optimization_barrier") == (platform == "cuda")


@pytest.mark.parametrize("name", ["full", "separable", "spatial-reduction:2"])
def test_a_block_has_the_attention_of_that_name(name):
    kinds = {"full": "Attention", "separable": "SeparableAttention", "spatial-reduction:2": "SpatialReductionAttention"}
    with torch.device("meta"):
        assert type(torch_blocks.Block(24, 3, 4.0, attention=name).attn).__name__ == kinds[name]
    block = nnx.eval_shape(lambda: blocks.Block(24, 3, 4.0, attention=name, rngs=nnx.Rngs(0)))
    assert type(block.attn).__name__ == kinds[name]
