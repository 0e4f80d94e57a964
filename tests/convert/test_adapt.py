"""Other classes, sizes and channels than the weights were trained for."""

import ml_dtypes
import numpy as np
import pytest
import torch
from timm.layers import resample_abs_pos_embed
from timm.models._manipulate import adapt_input_conv

from convert import ConversionError, load_flax, load_torch, load_weights
from convert.changes.adapt import adapt_channels, resample_pos_embed


def _embedding(tokens, dim=32):
    return np.random.default_rng(0).standard_normal((1, tokens, dim), np.float32)


@pytest.mark.parametrize(
    ("old", "new"),
    [((20, 20), (30, 30)), ((20, 20), (4, 4)), ((14, 14), (7, 21)), ((4, 10), (8, 5)), ((2, 2), (24, 24))],
)
def test_resampling_equals_timms(old, new):
    embedding = _embedding(1 + old[0] * old[1])
    want = resample_abs_pos_embed(torch.from_numpy(embedding), list(new), list(old)).numpy()
    got = resample_pos_embed(embedding, old, new)
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= 2e-6 * np.abs(want).max()
    assert np.array_equal(got[:, 0], embedding[:, 0])


def test_resampling_keeps_half_precision_within_its_rounding():
    embedding = _embedding(401).astype(ml_dtypes.bfloat16)
    got = resample_pos_embed(embedding, (20, 20), (30, 30))
    tensor = torch.from_numpy(embedding.astype(np.float32)).bfloat16()
    want = resample_abs_pos_embed(tensor, [30, 30], [20, 20]).float().numpy()
    assert got.dtype == ml_dtypes.bfloat16
    assert np.abs(got.astype(np.float32) - want).max() <= 2**-8 * np.abs(want).max()


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_channels_are_adapted_as_in_timm(channels):
    weight = np.random.default_rng(0).standard_normal((8, 3, 12, 12), np.float32)
    want = adapt_input_conv(channels, torch.from_numpy(weight.copy())).numpy()
    np.testing.assert_allclose(adapt_channels(weight, channels), want, rtol=1e-6, atol=1e-6)


def test_another_image_size_resamples_both_branches_and_says_so(weights_file, state):
    weights = load_weights(weights_file, image_size=96)
    assert weights.config.image_size == (96, 96)
    assert weights.config.image_scale == load_weights(weights_file).config.image_scale
    for branch, side in ((0, 8), (1, 4)):
        name = f"pos_embed_{branch}"
        want = resample_abs_pos_embed(state[name], [side, side]).numpy()
        np.testing.assert_allclose(weights.tensors[name], want, atol=1e-6)
    assert any("resampled" in note for note in weights.notes)


def test_a_new_head_is_like_that_of_a_fresh_model_and_said_aloud(weights_file, state, caplog):
    weights = load_weights(weights_file, num_classes=500, seed=3)
    for branch, dim in ((0, 96), (1, 192)):
        head = weights.tensors[f"head.{branch}.weight"]
        assert head.shape == (500, dim)
        assert head.std() == pytest.approx(0.02, rel=0.03)
        assert not weights.tensors[f"head.{branch}.bias"].any()
    again, other = (load_weights(weights_file, num_classes=500, seed=seed) for seed in (3, 4))
    assert np.array_equal(again.tensors["head.0.weight"], weights.tensors["head.0.weight"])
    assert not np.array_equal(other.tensors["head.0.weight"], weights.tensors["head.0.weight"])
    assert np.array_equal(weights.tensors["norm.0.weight"], state["norm.0.weight"])
    assert load_flax(weights_file, num_classes=500).config.num_classes == 500
    assert "new head for 500 classes instead of 10" in caplog.text


def test_the_same_number_of_classes_keeps_the_head(weights_file, state):
    weights = load_weights(weights_file, num_classes=10)
    assert np.array_equal(weights.tensors["head.0.weight"], state["head.0.weight"])
    assert weights.notes == ()


def test_zero_classes_drop_the_head(weights_file, timm_model, images):
    with torch.inference_mode():
        want = timm_model.forward_head(timm_model.forward_features(images), pre_logits=True)
        got = load_torch(weights_file, num_classes=0)(images)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_settings_without_tensors_pass_through(weights_file, timm_model, images):
    model = load_torch(weights_file, global_pool="avg", drop_path_rate=0.1)
    assert model.config.drop_path_rate == 0.1
    with torch.inference_mode():
        xs = timm_model.forward_features(images)
        want = sum(head(x[:, 1:].mean(1)) for head, x in zip(timm_model.head, xs, strict=True)) / 2
        got = model(images)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_other_channels_are_adapted_and_said_aloud(weights_file, images):
    weights = load_weights(weights_file, in_chans=1)
    assert weights.tensors["patch_embed.1.proj.weight"].shape == (192, 1, 16, 16)
    assert any("channel" in note for note in weights.notes)
    grey = images[:, :1]
    with torch.inference_mode():
        want = load_torch(weights_file)(grey.expand(-1, 3, -1, -1))
        got = load_torch(weights_file, in_chans=1)(grey)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_what_cannot_be_changed_or_makes_no_model_is_refused(weights_file):
    with pytest.raises(ConversionError, match=r"num_heads is \(3, 3\)"):
        load_weights(weights_file, num_heads=(6, 6))
    with pytest.raises(ConversionError, match="nearest valid sizes"):
        load_weights(weights_file, image_size=50)
    with pytest.raises(TypeError, match="unknown setting 'droprate'"):
        load_weights(weights_file, droprate=0.1)
