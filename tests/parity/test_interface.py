"""The face of both twins: names, settings, and what is said about mistakes."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import jaxtyping
import pytest
import timm
import torch
from flax import nnx
from timm.models._features import FeatureGetterNet

import crossvit_jax
import crossvit_torch
from crossvit_jax.config import IBM_NAMES, TIMM_NAMES, VARIANTS, get_config, list_variants
from tests.parity.reference import OUTPUT_BOUND, abstract, error, images
from tests.small_model import small_config
from tests.train.small_weights import small_timm_model

PARAMETERS = {  # measured on timm 1.0.31
    "ti": 7_014_800,
    "s": 26_856_272,
    "b": 105_025_232,
    "9": 8_553_296,
    "15": 27_528_464,
    "18": 43_271_408,
    "9-dagger": 8_776_592,
    "15-dagger": 28_209_008,
    "18-dagger": 44_266_976,
    "15-dagger-408": 28_500_080,
    "18-dagger-408": 44_606_560,
}


@pytest.fixture
def without_type_checks():
    """As users run it: mistakes must be caught by the code itself, not by the shape annotations."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_both_packages_list_the_eleven_variants():
    assert crossvit_jax.list_variants() == crossvit_torch.list_variants() == list(PARAMETERS)


@pytest.mark.parametrize("variant", list_variants())
def test_every_variant_has_timms_parameters_and_settings(variant):
    reference = timm.create_model(TIMM_NAMES[variant], device="meta")
    twin = crossvit_torch.create_model(variant, device="meta")
    shapes = {name: tuple(x.shape) for name, x in reference.state_dict().items()}
    assert {name: tuple(x.shape) for name, x in twin.state_dict().items()} == shapes
    assert sum(x.numel() for x in twin.parameters()) == PARAMETERS[variant]
    assert list(get_config(variant).branch_image_size) == reference.img_size_scaled
    assert get_config(variant).crop_pct == reference.default_cfg["crop_pct"]
    assert twin.num_features == reference.num_features
    assert twin.head_hidden_size == reference.head_hidden_size
    assert twin.feature_info == reference.feature_info
    assert twin.no_weight_decay() == reference.no_weight_decay()


def test_timms_feature_extractor_takes_the_torch_twin():
    reference = small_timm_model(5)
    twin = crossvit_torch.CrossViT(small_config(5)).eval()
    twin.load_state_dict(reference.state_dict())
    x = torch.tensor(images(48), dtype=torch.float32)
    assert twin.get_classifier() is twin.head
    pooled = twin.forward_head(twin.forward_features(x), pre_logits=True)
    assert pooled.shape == (2, twin.head_hidden_size)
    timms, ours = (FeatureGetterNet(model, out_indices=(0, 1)) for model in (reference, twin))
    assert ours.feature_info.channels() == timms.feature_info.channels() == [12, 24]
    assert ours.feature_info.reduction() == timms.feature_info.reduction() == [12, 24]
    by_default = [model.forward_intermediates(x)[1] for model in (twin, reference)]  # maps, channels first
    for result, expected in (*zip(ours(x), timms(x), strict=True), *zip(*by_default, strict=True)):
        assert result.shape == expected.shape
        assert error(result, expected) <= OUTPUT_BOUND["float32"]
    twin.reset_classifier(0)
    torch.testing.assert_close(twin(x), pooled)
    assert twin.num_features == pooled.shape[1]


def test_the_flax_tree_has_timms_paths():
    reference = timm.create_model(TIMM_NAMES["9-dagger"], device="meta")
    model = abstract("9-dagger")
    paths = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    modules = {name for name, module in reference.named_modules() if list(module.parameters(recurse=False))}
    assert {path.rpartition(".")[0] for path in paths} == modules
    assert {path for path in paths if "." not in path} == reference.no_weight_decay() == model.no_weight_decay()


@pytest.mark.parametrize("variant", list_variants())
def test_a_variant_goes_by_its_short_name_timms_and_ibms(variant):
    names = [variant, TIMM_NAMES[variant], f"{TIMM_NAMES[variant]}.in1k", IBM_NAMES[variant]]
    assert [get_config(name) for name in names] == [VARIANTS[variant]] * 4


def test_an_unknown_name_lists_the_known_and_the_nearest():
    for create in (crossvit_torch.create_model, abstract):
        with pytest.raises(ValueError, match=r"'crossvit_smal_240'; did you mean 'crossvit_small_240'.*15-dagger-408"):
            create("crossvit_smal_240")


def test_an_unknown_setting_names_those_accepted():
    for create in (crossvit_torch.create_model, abstract):
        with pytest.raises(TypeError, match=r"'img_size'; accepted: .*image_size"):
            create("ti", img_size=240)


@pytest.mark.parametrize(
    ("variant", "size", "message"),
    [
        ("ti", 224, "height 224 .* nearest valid sizes are 120 and 240"),
        ("ti", 50, "height 50 .* nearest valid sizes are 120 and 240"),
        ("ti", (240, 300), "width 300 .* nearest valid sizes are 240 and 360"),
        ("15-dagger-408", 400, "height 400 .* nearest valid sizes are 204 and 408"),
        ("ti", 0, "image_size must be"),
    ],
)
def test_an_image_size_that_cuts_patches_names_the_nearest(variant, size, message):
    with pytest.raises(ValueError, match=message):
        crossvit_torch.create_model(variant, image_size=size)


@pytest.mark.parametrize("size", [720, 840, 1080, (120, 600)])
def test_image_sizes_that_timm_miscounts_have_whole_grids(size):
    config = get_config("ti", image_size=size)
    for (height, width), (rows, columns), patch in zip(
        config.branch_image_size, config.grid_size, config.patch_size, strict=True
    ):
        assert (rows * patch, columns * patch) == (height, width)


@pytest.mark.parametrize(
    "settings",
    [{"global_pool": "max"}, {"num_classes": -1}, {"in_chans": 0}, {"drop_path_rate": 1.0}, {"drop_rate": -0.1}],
    ids=str,
)
def test_a_setting_out_of_range_is_named(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        get_config("ti", **settings)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (jnp.zeros((2, 3, 120, 120)), r"shape \(batch, height, width, 3\); got \(2, 3, 120, 120\)"),
        (jnp.zeros((120, 120, 3)), r"shape \(batch, height, width, 3\); got \(120, 120, 3\)"),
        (jnp.zeros((1, 120, 120, 3), jnp.uint8), "normalised floats; got dtype uint8"),
    ],
)
def test_wrong_images_are_refused_by_the_flax_model(without_type_checks, x, message):
    model = abstract("9", image_size=120)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model, x)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 120, 120, 3), r"shape \(batch, 3, height, width\); got \(2, 120, 120, 3\)"),
        (torch.zeros(3, 120, 120), r"shape \(batch, 3, height, width\); got \(3, 120, 120\)"),
        (torch.zeros(1, 3, 120, 120, dtype=torch.uint8), "normalised floats; got dtype torch.uint8"),
    ],
)
def test_wrong_images_are_refused_by_the_torch_model(without_type_checks, x, message):
    with pytest.raises(ValueError, match=message):
        crossvit_torch.create_model("9", image_size=120)(x)


@pytest.mark.parametrize("call", [{"indices": [6]}, {"indices": 0}, {"indices": []}, {"output_fmt": "HWC"}], ids=str)
def test_wrong_intermediates_are_refused(call):
    model = crossvit_torch.create_model("9", image_size=120)
    with pytest.raises(ValueError, match=r"feature indices must be|output_fmt must be"):
        model.forward_intermediates(torch.zeros(1, 3, 120, 120), **call)


def test_the_config_imports_no_framework():
    code = "import sys, crossvit_jax.config; print(*(set(sys.modules) & {'jax', 'flax', 'torch', 'numpy'}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


def test_double_follows_the_whole_torch_model():
    model = crossvit_torch.create_model("9", image_size=120).double()
    assert model(torch.zeros(1, 3, 120, 120)).dtype == torch.float64
