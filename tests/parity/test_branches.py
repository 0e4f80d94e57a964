"""Any number of branches, more fusion blocks, other patch sizes: both twins against timm's class, with gradients.

timm's class is mended where it knows two branches only, or takes the last one for the deepest.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import timm.models.crossvit as timm_crossvit
import torch
from flax import nnx
from timm.layers import calculate_drop_path_rates

import crossvit_jax
import crossvit_torch
from convert.architecture import abstract_model
from convert.models import flax_model
from convert.tree import flatten, from_state_dict
from convert.weights import Weights
from crossvit_jax.config import Branch, CrossViTConfig, get_config
from tests.parity.reference import (
    GRADIENT_BOUND,
    OUTPUT_BOUND,
    TimmReduced,
    TimmSeparable,
    channels_last,
    error,
    gradient_errors,
    images,
    perturb,
    random_array,
)

SMALL = Branch(embed_dim=12, depth=1, num_heads=2, mlp_ratio=2.0, patch_size=12)
LARGE = Branch(embed_dim=24, depth=2, num_heads=3, mlp_ratio=3.0, patch_size=16, image_scale=2 / 3)
THIRD = Branch(embed_dim=20, depth=1, num_heads=4, mlp_ratio=1.5, patch_size=8, image_scale=1 / 2)


def at(branch: Branch, **changes) -> Branch:
    return Branch(**{**vars(branch), **changes})


CASES = {
    "three": {"branches": (SMALL, LARGE, THIRD), "stages": 2},  # the last is not the deepest
    "one": {"branches": (LARGE,), "stages": 1, "fusion_depth": 1},
    "depths by stage": {"branches": (at(SMALL, depth=(1, 2)), at(LARGE, depth=1)), "fusion_depth": (2, 0)},
    "separable": {"branches": (at(SMALL, attention="separable"), at(LARGE, depth=1)), "stages": 1, "fusion_depth": 1},
    "spatial reduction": {
        "branches": (at(SMALL, attention="spatial-reduction:2"), at(LARGE, depth=1)),
        "stages": 1,
        "fusion_depth": 1,
    },
    "three convolutions": {
        "branches": (at(LARGE, depth=1, image_scale=1), SMALL, SMALL),
        "stages": 1,
        "fusion_depth": 1,
        "multi_conv": True,
        "global_pool": "avg",
    },
}


def config_of(case: str, **settings) -> CrossViTConfig:
    return CrossViTConfig(name="test", image_size=48, num_classes=5, **(CASES[case] | settings))


class Mended(timm_crossvit.CrossVit):
    def _embed(self, x):
        xs = []
        for i, patch_embed in enumerate(self.patch_embed):
            y = patch_embed(timm_crossvit.scale_image(x, self.img_size_scaled[i], self.crop_scale))
            cls_token = getattr(self, f"cls_token_{i}").expand(x.shape[0], -1, -1)
            xs.append(self.pos_drop(torch.cat((cls_token, y), dim=1) + getattr(self, f"pos_embed_{i}")))
        return xs


def reference_of(config: CrossViTConfig, monkeypatch, of=Mended) -> torch.nn.Module:
    total = sum(map(len, config.drop_path_rates))
    monkeypatch.setattr(
        timm_crossvit, "calculate_drop_path_rates", lambda rate, _: calculate_drop_path_rates(rate, total)
    )
    depth = [[*depths, fusion] for depths, fusion in zip(config.stage_depths, config.fusion_depths, strict=True)]
    settings = {name: getattr(config, name) for name in ("num_classes", "global_pool", "multi_conv", "drop_path_rate")}
    model = of(
        img_size=config.image_size,
        img_scale=tuple(map(float, config.image_scale)),
        patch_size=config.patch_size,
        embed_dim=config.embed_dim,
        depth=depth,
        num_heads=config.num_heads,
        mlp_ratio=(*config.mlp_ratio, 1.0),
        **settings,
    )
    for stage in model.blocks:
        for blocks, branch, grid in zip(stage.blocks, config.branches, config.grid_size, strict=True):
            for block in blocks:
                if branch.sr_ratio > 1:
                    block.attn = TimmReduced(branch.embed_dim, branch.num_heads, branch.sr_ratio, grid)
                if branch.attention == "separable":
                    block.attn = TimmSeparable(branch.embed_dim)
    return model


def flax_twin(twin: crossvit_torch.CrossViT, precision: str) -> crossvit_jax.CrossViT:
    return flax_model(Weights(config=twin.config, tensors=from_state_dict(twin.state_dict())), param_dtype=precision)


def torch_run(model: torch.nn.Module, x: np.ndarray, dtype: torch.dtype) -> tuple[list, dict]:
    """Logits and the tokens of every branch; and the gradients of a weighted sum of them all, by name."""
    x = torch.tensor(x, dtype=dtype, requires_grad=True)
    outs = [model(x), *model.forward_features(x)]
    torch.autograd.backward(
        outs, [torch.tensor(random_array(i, *out.shape), dtype=dtype) for i, out in enumerate(outs)]
    )
    return outs, {"images": x.grad} | {name: parameter.grad for name, parameter in model.named_parameters()}


def flax_run(model: crossvit_jax.CrossViT, x: np.ndarray, precision: str) -> tuple[list, dict]:
    graphdef, params = nnx.split(model)

    def call(params, x):
        model = nnx.merge(graphdef, params)
        outs = model.forward_features(x)
        return [model.forward_head(outs), *outs]

    @jax.jit
    def run(params, x):
        outs, vjp = jax.vjp(call, params, x)
        return outs, *vjp([jnp.asarray(random_array(i, *out.shape), out.dtype) for i, out in enumerate(outs)])

    outs, gradients, d_x = run(params, jnp.asarray(channels_last(x), precision))
    return outs, {"images": d_x.transpose(0, 3, 1, 2)} | flatten(gradients)


# in float32 one case is enough: a mistake is found in float64, where it cannot hide
@pytest.mark.parametrize(("case", "precision"), [("three", "float32"), *((case, "float64") for case in CASES)])
def test_outputs_and_gradients_equal_timms(case, precision, monkeypatch):
    config, dtype = config_of(case), getattr(torch, precision)
    reference = perturb(reference_of(config, monkeypatch)).to(dtype)
    twin = crossvit_torch.CrossViT(config, param_dtype=dtype).eval()
    twin.load_state_dict(reference.state_dict(), strict=True)
    outs, gradients = torch_run(reference, images(48), dtype)
    results = [torch_run(twin, images(48), dtype)]
    with jax.enable_x64(precision == "float64"):
        flax = flax_twin(twin, precision)
        results.append(flax_run(flax, images(48), precision))
    for result, d_result in results:
        assert max(map(error, result, outs)) <= OUTPUT_BOUND[precision]
        errors = gradient_errors(d_result, gradients)
        assert max(errors.values()) <= GRADIENT_BOUND[precision], errors


def test_timms_own_class_has_one_branch_and_more_fusion_blocks(monkeypatch):
    """What is mended above changes nothing where timm's class needs no mending; and a call is features and head."""
    for case in ("one", "depths by stage"):
        config = config_of(case)
        own, mended = (perturb(reference_of(config, monkeypatch, of)) for of in (timm_crossvit.CrossVit, Mended))
        twin = crossvit_torch.CrossViT(config).eval()
        twin.load_state_dict(own.state_dict())
        x = torch.tensor(images(48), dtype=torch.float32)
        with torch.no_grad():
            assert torch.equal(mended(x), own(x))
            assert error(twin(x), own(x)) <= OUTPUT_BOUND["float32"]


@pytest.mark.parametrize("case", ["three", "depths by stage", "three convolutions"])
def test_every_block_drops_its_path_as_often_as_timms(case, monkeypatch):
    config = config_of(case, drop_path_rate=0.3)
    reference = reference_of(config, monkeypatch)
    twin = crossvit_torch.CrossViT(config)
    expected = {name: m.drop_prob for name, m in reference.named_modules() if hasattr(m, "drop_prob")}
    rates = {name: m.rate for name, m in twin.named_modules() if name.split(".")[-1].startswith("drop_path")}
    assert {name: rate for name, rate in rates.items() if rate} == pytest.approx(expected)
    flax = nnx.merge(*abstract_model(config))
    own = {".".join(map(str, path)): m.rate for path, m in nnx.iter_modules(flax) if hasattr(m, "rate")}
    assert {name: rate for name, rate in own.items() if "drop_path" in name} == rates


def test_the_last_branch_need_not_be_the_deepest():
    config = config_of("three", fusion_depth=1, drop_path_rate=0.5)
    assert np.ravel(config.drop_path_rates) == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    depth = ((2, 1, 1), (2, 1, 1))
    with pytest.raises(IndexError):  # timm counts two rates for each stage, and takes three
        timm_crossvit.CrossVit(
            48, patch_size=(8, 12), embed_dim=(12, 12), depth=depth, num_heads=(2, 2), mlp_ratio=(1, 1, 1)
        )


def test_attention_maps_have_the_paths_of_the_modules():
    branches = (at(SMALL, attention="spatial-reduction:2"), LARGE, at(THIRD, attention="separable"))
    config = config_of("three", branches=branches, stages=1, fusion_depth=1)
    twin = crossvit_torch.CrossViT(config).eval()
    with torch.no_grad():
        maps = twin.attention_maps(torch.tensor(images(48), dtype=torch.float32))
    assert maps.keys() == {name for name, _ in twin.named_modules() if name.endswith(".attn")}
    tokens = [1 + rows * columns for rows, columns in config.grid_size]
    assert all(torch.allclose(weights.sum(-1), torch.tensor(1.0)) for weights in maps.values())
    of_squares = maps["blocks.0.blocks.0.0.attn"]
    assert of_squares.shape[2:] == (tokens[0], tokens[0])
    squares = of_squares[..., 1:].unflatten(3, (2, 2, 2, 2))  # whose 2 x 2 patches are told the same
    assert torch.equal(squares, squares[:, :, :, :, :1, :, :1].expand_as(squares))
    for branch in range(3):  # the class token of a branch with the patches of the next
        fused = maps[f"blocks.0.fusion.{branch}.0.attn"]
        assert fused.shape == (2, config.num_heads[(branch + 1) % 3], 1, tokens[(branch + 1) % 3])
    flax = flax_twin(twin, "float32")
    own = nnx.jit(lambda model, x: model.attention_maps(x))(flax, jnp.asarray(channels_last(images(48)), jnp.float32))
    assert max(error(own[path], maps[path]) for path in maps) <= OUTPUT_BOUND["float32"]


def test_keys_are_reduced_over_the_grid_that_images_have():
    """Of another size than the model's, and cut into other patches."""
    config = config_of("spatial reduction")
    twin = crossvit_torch.CrossViT(config).eval()
    flax = flax_twin(twin, "float32")

    def both(method, x, **settings):
        x = torch.tensor(x, dtype=torch.float32)
        with torch.no_grad():
            expected = getattr(twin, method)(x, **settings)
        run = nnx.jit(lambda model, x: getattr(model, method)(x, **settings))
        return zip(run(flax, jnp.asarray(channels_last(x.numpy()))), expected, strict=True)

    for ours, expected in both("forward_features", random_array(0, 2, 3, 24, 96), own_size=True):
        assert error(ours, expected) <= OUTPUT_BOUND["float32"]
    for ours, expected in both("forward_features", images(48), patch_size=(6, 16)):
        assert error(ours, expected) <= OUTPUT_BOUND["float32"]
    with pytest.raises(ValueError, match="spatial-reduction:2 of branch 0 does not divide its 3 x 3 patches"):
        config.at_patch_size((16, 16))


def test_intermediate_features_of_every_branch():
    config = config_of("three")
    model = nnx.merge(*abstract_model(config))
    x = jax.ShapeDtypeStruct((1, 48, 48, 3), jnp.float32)
    maps = nnx.eval_shape(lambda model, x: model.forward_intermediates(x, intermediates_only=True), model, x)
    expected = [(1, *grid, dim) for grid, dim in zip(config.grid_size, config.embed_dim, strict=True) for _ in range(2)]
    assert [y.shape for y in maps] == expected
    assert model.num_features == 56


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": (0, 4)}, "depth must be a whole number from 1 to 1024; got 0"),
        ({"depth": ((1, 0, 1), 4)}, "depth must be a whole number from 1 to 1024; got 0"),
        ({"depth": ((1, 2), 4)}, r"depth \(1, 2\) has numbers for 2 stages; there are 3"),
        ({"depth": 4}, "depth must be 2 values, one per branch; got 4"),
        ({"fusion_depth": -1}, "fusion_depth must be a whole number from 0 to 1024; got -1"),
        ({"image_scale": (1, 1, 1)}, "image_scale must be 2 values, one per branch"),
        ({"image_scale": (1, 0)}, "image_scale must be a number above 0"),
        ({"num_heads": (5, 3)}, "embed_dim 96 cannot be cut into num_heads 5"),
        ({"head_dim": (None, 50)}, "embed_dim 192 cannot be cut into heads of head_dim 50, of which num_heads 3"),
        ({"head_dim": (None, 96)}, "embed_dim 192 cannot be cut into heads of head_dim 96, of which num_heads 3"),
        (
            {"head_dim": (None, 64), "num_heads": (3, 2), "attention": ("full", "separable")},
            "head_dim is for full attention alone; got 64 with separable",
        ),
        (
            {"attention": ("full", "linear")},
            "attention must be full, separable or spatial-reduction:N, .* got 'linear'",
        ),
        ({"attention": ("spatial-reduction:1", "full")}, "from 2, of .* got 'spatial-reduction:1'"),
        ({"attention": ("spatial-reduction:3", "full")}, "spatial-reduction:3 of branch 0 does not divide its 20 x 20"),
        ({"attention": ("full", "separable"), "reduce_tokens": "merge:8"}, "needs full .* branch 1 has separable"),
        (
            {"attention": ("full", "spatial-reduction:2"), "reduce_tokens": "fusion:0.7"},
            "fusion:0.7 needs full or separable attention, and branch 1 has spatial-reduction:2",
        ),
        ({"head_dim": (0, None)}, "head_dim must be a whole number from 1"),
        ({"multi_conv": True, "patch_size": (8, 16), "image_scale": (1, 1)}, "needs patch_size 12 or 16"),
        ({"branches": ()}, "branches must be at least one"),
    ],
    ids=str,
)
def test_settings_that_make_no_branches_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        get_config("ti", **settings)


def test_six_names_take_one_value_per_branch():
    six = {"embed_dim": (12, 24, 36), "depth": (1, 2, 3), "num_heads": (2, 2, 2), "mlp_ratio": (1, 2, 3)}
    config = get_config("ti", **six, patch_size=(12, 16, 24), image_scale=(1, 14 / 15, 0.5))
    assert config.branches[2] == Branch(
        embed_dim=36, depth=3, num_heads=2, mlp_ratio=3, patch_size=24, image_scale=1 / 2
    )
    assert config.embed_dim == (12, 24, 36)
    assert config.replace(depth=(3, 2, 1)).depth == (3, 2, 1)
    assert config.replace(depth=((2, 2, 2), 2, (1, 2, 3))).depth == (2, 2, (1, 2, 3))


def test_a_branch_is_read_from_the_text_that_it_is_written_as():
    for branch in (SMALL, at(LARGE, depth=(1, 2)), at(THIRD, mlp_ratio=8 / 3), at(SMALL, num_heads=1, head_dim=6)):
        assert Branch.parse(str(branch)) == branch
    for attention in ("separable", "spatial-reduction:2"):
        assert Branch.parse(str(at(LARGE, attention=attention))).attention == attention
    assert at(SMALL, head_dim=6) == SMALL  # all heads are there
    assert str(SMALL) == "embed_dim=12,depth=1,num_heads=2,mlp_ratio=2,patch_size=12,image_scale=1"
    for text, message in {
        "embed_dim=12,depth=1": "num_heads, patch_size must be given",
        f"{SMALL},width=3": "'width' is none of embed_dim",
        f"{SMALL},depth=2": "'depth' is there twice",
        "depth=1:x": "depth cannot be '1:x'",
    }.items():
        with pytest.raises(ValueError, match=message):
            Branch.parse(text)
