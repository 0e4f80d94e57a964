"""The pyramid: each module against torch.nn and timm, the Flax twin against the torch twin; outputs and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import timm.layers
import torch
from torch import nn
from torch.nn import functional

import crossvit_jax.resize
import crossvit_torch.resize
from crossvit_jax import pyramid
from crossvit_jax.config import Branch, CrossViTConfig, DetectorConfig, SegmenterConfig, get_config, get_dense_config
from crossvit_torch import pyramid as torch_pyramid
from tests.parity.reference import (
    GRADIENT_BOUND,
    OUTPUT_BOUND,
    PRECISIONS,
    channels_last,
    error,
    flax_gradients,
    flax_module,
    gradient_errors,
    images,
    perturb,
    random_array,
    torch_gradients,
)
from tests.small_model import small_detector


class Level(nn.Module):
    """A level of torch's and timm's parts, as detectron2's simple pyramid has them."""

    def __init__(self, dim: int, width: int, shrink: int):
        super().__init__()
        self.up = nn.ConvTranspose2d(dim, dim // 2, 2, stride=2) if shrink < 0 else None
        dim = dim // 2 if shrink < 0 else dim
        self.pools = nn.Sequential(*(nn.MaxPool2d(2, ceil_mode=True) for _ in range(shrink)))
        self.convs = nn.Sequential(
            nn.Conv2d(dim, width, 1, bias=False),
            timm.layers.LayerNorm2d(width, eps=1e-6),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            timm.layers.LayerNorm2d(width, eps=1e-6),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.convs(self.pools(x if self.up is None else self.up(x)))

    def own_names(self) -> dict[str, torch.Tensor]:
        """The parameters under our names; those of the transposed convolution as a linear layer's."""
        names = {"0": "conv1", "1": "norm1", "2": "conv2", "3": "norm2"}
        own = {f"{names[n[6]]}{n[7:]}": x for n, x in self.state_dict().items() if n.startswith("convs")}
        if self.up is not None:
            own["up.weight"] = self.up.weight.permute(2, 3, 1, 0).flatten(0, 2)
            own["up.bias"] = self.up.bias.repeat(4)
        return own


class Pyramid(nn.Module):
    """The whole: every branch brought to the first one's grid, a linear layer, and the levels."""

    def __init__(self, config: DetectorConfig):
        super().__init__()
        dims = config.backbone.embed_dim
        self.fuse = nn.Conv2d(sum(dims), max(dims), 1)  # a linear layer over channels
        self.levels = nn.ModuleList(Level(max(dims), config.width, shrink) for shrink in config.shrinks)

    def forward(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        size = maps[0].shape[2:]
        maps = [functional.interpolate(x, size, mode="bilinear", align_corners=False) for x in maps]
        x = self.fuse(torch.cat(maps, dim=1))
        return [level(x) for level in self.levels]

    def own_names(self) -> dict[str, torch.Tensor]:
        levels = {f"levels.{i}.{n}": x for i, level in enumerate(self.levels) for n, x in level.own_names().items()}
        return levels | {"fuse.weight": self.fuse.weight[:, :, 0, 0], "fuse.bias": self.fuse.bias}


def _channels_last_outputs(module: nn.Module, args: tuple, outputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """As Flax has them, so that they get the same random weights in `torch_gradients`."""
    return [x.permute(0, 2, 3, 1) for x in outputs]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", [48, (72, 48)])  # 72 pixels are 6 patches, which are halved to 3 and 2
def test_the_levels_equal_those_of_torchs_and_timms_parts(size, precision):
    config = small_detector(size)
    shapes = [(dim, *grid) for dim, grid in zip(config.backbone.embed_dim, config.backbone.grid_size, strict=True)]
    maps = [random_array(i, 2, *shape) for i, shape in enumerate(shapes)]
    reference = perturb(Pyramid(config)).to(getattr(torch, precision))
    weights = {name: x.detach().clone() for name, x in reference.own_names().items()}
    reference.register_forward_hook(_channels_last_outputs)
    expected = torch_gradients(reference, maps, precision)
    twin = torch_pyramid.SimplePyramid(config, param_dtype=getattr(torch, precision))
    twin.load_state_dict(weights, strict=True)
    twin.register_forward_hook(_channels_last_outputs)
    result = torch_gradients(twin, maps, precision)
    assert tuple(tuple(x.shape[1:3]) for x in expected.outputs) == config.level_grids
    for got, want in zip(result.outputs + result.inputs, expected.outputs + expected.inputs, strict=True):
        assert error(got, want) <= GRADIENT_BOUND[precision]
    # what the four copies of a transposed convolution's bias get is, in sum, the gradient of the one
    grads = {name: x.grad for name, x in reference.named_parameters()}
    ups = {f"levels.0.up.{leaf}": grads[f"levels.0.up.{leaf}"] for leaf in ("weight", "bias")}
    got = result.parameters["levels.0.up.weight"].reshape(2, 2, -1, max(config.backbone.embed_dim)).permute(3, 2, 0, 1)
    assert error(got, ups["levels.0.up.weight"]) <= GRADIENT_BOUND[precision]
    assert (
        error(result.parameters["levels.0.up.bias"].reshape(4, -1).sum(0), ups["levels.0.up.bias"])
        <= (GRADIENT_BOUND[precision])
    )

    with jax.enable_x64(precision == "float64"):
        flax = flax_module(lambda rngs: pyramid.SimplePyramid(config, param_dtype=precision, rngs=rngs), weights)
        own = flax_gradients(flax, maps, precision)
        for got, want in zip(own.outputs, expected.outputs, strict=True):
            assert error(got, want) <= OUTPUT_BOUND[precision]
    for got, want in zip(own.inputs, expected.inputs, strict=True):
        assert error(got, want) <= GRADIENT_BOUND[precision]
    assert max(gradient_errors(own.parameters, result.parameters).values()) <= GRADIENT_BOUND[precision]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("before", "after"), [((14, 14), (20, 20)), ((4, 6), (8, 12)), ((5, 3), (64, 48)), ((9, 7), (4, 7))]
)
def test_bilinear_resizing_equals_torchs(before, after, precision):
    x = images(before, channels=4).astype(precision)
    expected = functional.interpolate(torch.tensor(x), size=after, mode="bilinear", align_corners=False).numpy()
    with jax.enable_x64(precision == "float64"):
        result = crossvit_jax.resize.resize_bilinear(jnp.asarray(channels_last(x)), after)
    assert error(result, channels_last(expected)) <= {"float32": 1e-6, "float64": 1e-14}[precision]
    assert error(crossvit_torch.resize.resize_bilinear(torch.tensor(x), after), expected) == 0


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 3), (6, 6)])
@pytest.mark.parametrize("before", [(5, 5), (8, 5), (2, 3)])
def test_adaptive_averages_equal_torchs_where_sides_do_not_divide(before, size):
    x = images(before, channels=4)
    expected = functional.adaptive_avg_pool2d(torch.tensor(x), size).numpy()
    with jax.enable_x64():
        result = crossvit_jax.resize.adaptive_average(jnp.asarray(channels_last(x)), size)
    assert error(result, channels_last(expected)) <= 1e-14


def test_maxima_are_cut_by_the_border_as_torchs_are():
    x = images((5, 7), channels=2).astype(np.float32)
    expected = functional.max_pool2d(torch.tensor(x), 2, ceil_mode=True).numpy()
    np.testing.assert_array_equal(pyramid.halve(jnp.asarray(channels_last(x))), channels_last(expected))
    assert expected.shape[2:] == (3, 4)


# --- settings ---


def test_a_published_variant_has_four_levels_from_6_pixels_on():
    config = get_dense_config("detection", "ti", num_classes=80)
    assert config.strides == (6, 12, 24, 48)
    assert config.level_grids == ((40, 40), (20, 20), (10, 10), (5, 5))
    assert config.distance_ranges == ((0, 48), (48, 96), (96, 192), (192, float("inf")))
    assert (config.width, config.num_convs, config.backbone.num_classes) == (128, 2, 0)
    assert get_dense_config("segmentation", "b", num_classes=2).width == 256


def test_the_small_scenes_are_a_matter_of_settings():
    settings = {"image_size": 96, "image_scale": (1, 2 / 3), "width": 64, "num_classes": 10}
    config = get_dense_config("detection", "ti", strides=(6, 12, 24), distances=(24, 48), **settings)
    assert config.level_grids == ((16, 16), (8, 8), (4, 4))
    assert config.distance_ranges == ((0, 24), (24, 48), (48, float("inf")))
    assert config.replace(image_size=(48, 144)).level_grids == ((8, 24), (4, 12), (2, 6))
    assert config.replace(strides=(12, 24)).distances == (96,)


def test_the_mask_decoder_attends_over_the_patches():
    config = get_dense_config("segmentation", "ti", num_classes=5, decoder="mask")
    assert config.strides == (12,)
    assert config.replace(decoder="upernet").strides == (6, 12, 24, 48)


def test_points_of_custom_branches_follow_the_first_branch():
    branch = {"embed_dim": 24, "depth": 1, "num_heads": 2}
    branches = (Branch(patch_size=5, **branch), Branch(patch_size=10, **branch))
    config = SegmenterConfig(
        backbone=CrossViTConfig(name="custom", branches=branches, image_size=50), num_classes=2, width=32
    )
    assert config.strides == (5, 10, 20, 40)  # half of 5 pixels would be no whole number
    assert config.level_grids == ((10, 10), (5, 5), (3, 3), (2, 2))


@pytest.mark.parametrize(
    ("task", "settings", "words"),
    [
        ("detection", {"width": 48}, "width must be a multiple of 32; got 48"),
        ("detection", {"num_classes": 0}, "num_classes must be a whole number from 1 to 65536; got 0"),
        ("detection", {"strides": (8, 16)}, r"strides must begin at 6 or 12 and double .* got \(8, 16\)"),
        ("detection", {"strides": (6, 24)}, "double from level to level"),
        ("detection", {"strides": ()}, "strides must begin at"),
        ("detection", {"distances": (48, 24, 96)}, "distances must be 3 ascending numbers"),
        ("detection", {"num_convs": 0}, "num_convs must be"),
        ("segmentation", {"decoder": "fpn"}, "decoder must be 'upernet' or 'mask'; got 'fpn'"),
        ("segmentation", {"decoder": "mask", "strides": (6, 12)}, "attends over one level"),
        ("segmentation", {"decoder": "mask", "width": 96}, "multiple of 64"),
        ("segmentation", {"decoder": "mask", "scse": True}, "scse is a part of"),
        ("boxes", {}, "task must be 'detection' or 'segmentation'; got 'boxes'"),
    ],
)
def test_settings_that_make_no_model_are_refused_by_name(task, settings, words):
    with pytest.raises(ValueError, match=words):
        get_dense_config(task, "ti", **{"num_classes": 3} | settings)


def test_unknown_settings_are_told_with_those_that_are_known():
    with pytest.raises(TypeError, match=r"unknown setting 'widht'; accepted: .*image_size.*width"):
        get_dense_config("detection", "ti", num_classes=3, widht=64)
    with pytest.raises(TypeError, match="num_classes is missing"):
        get_dense_config("detection", "ti")


# --- what a trainer asks ---


def test_the_map_does_not_see_the_last_fusion_and_all_else_has_a_gradient():
    config = small_detector()
    assert config.backbone.stages == 1
    with torch.random.fork_rng():
        twin = perturb(torch_pyramid.PyramidBackbone(config)).double()
    x = torch.tensor(images(48))
    sum((level * torch.randn_like(level)).sum() for level in twin(x)).backward()
    without = {name for name, p in twin.named_parameters() if p.grad is None or not p.grad.any()}
    body = twin.body
    assert without == {f"body.{name}" for name, _ in body.named_parameters() if body.unused_by_patches(name)}
    assert {name.split(".")[2] for name, _ in body.named_parameters() if body.unused_by_patches(name)} == {
        "projs",
        "fusion",
        "revert_projs",
    }


def test_36_tensors_of_a_published_variant_are_unused():
    with torch.device("meta"):
        model = torch_pyramid.DenseModel(get_dense_config("detection", "ti", num_classes=3))
    unused = [name for name, _ in model.named_parameters() if model.unused(name)]
    assert len(unused) == 36 and all(name.startswith("backbone.body.blocks.2.") for name in unused)
    classifier = get_config("ti")
    assert classifier.stages == 3
