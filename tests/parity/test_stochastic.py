"""Training mode: which layers drop what, at which rate, with which statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import timm
import timm.layers
import torch
from flax import nnx

import crossvit_jax
import crossvit_torch
from crossvit_jax.blocks import DropPath
from crossvit_jax.config import TIMM_NAMES, get_config, list_variants
from crossvit_torch.blocks import DropPath as TorchDropPath
from tests.parity.reference import abstract, channels_last, images

SAMPLES = 20_000
SHALLOW = {"image_size": 120, "num_classes": 5, "stages": 1, "depth": (1, 2)}
RATES = {"drop_rate": 0.1, "pos_drop_rate": 0.15, "proj_drop_rate": 0.2, "attn_drop_rate": 0.25, "drop_path_rate": 0.3}


def drop_path_rates(model) -> dict[str, float]:
    """The rate of every drop path by its path; those without effect are left out."""
    if isinstance(model, nnx.Module):
        return {
            ".".join(map(str, path)): module.rate
            for path, module in nnx.iter_modules(model)
            if isinstance(module, DropPath) and module.rate > 0
        }
    rates = {
        name: module.rate if isinstance(module, TorchDropPath) else module.drop_prob
        for name, module in model.named_modules()
        if isinstance(module, TorchDropPath | timm.layers.DropPath)
    }
    return {name: rate for name, rate in rates.items() if rate > 0}


def dropout_rates(model) -> dict[str, float]:
    """The rate of every dropout by its path."""
    if isinstance(model, nnx.Module):
        modules = ((".".join(map(str, path)), module) for path, module in nnx.iter_modules(model))
        return {path: module.rate for path, module in modules if isinstance(module, nnx.Dropout)}
    return {name: module.p for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout)}


@pytest.mark.parametrize("variant", list_variants())
def test_every_block_has_timms_drop_path_rate(variant):
    reference = drop_path_rates(timm.create_model(TIMM_NAMES[variant], drop_path_rate=0.1, device="meta"))
    config = get_config(variant, drop_path_rate=0.1)
    assert len(reference) == 3 * (2 * max(config.depth) + 2 * min(config.depth) + 2) - 4  # the first blocks have none
    flax = abstract(variant, drop_path_rate=0.1)
    for model in (flax, crossvit_torch.CrossViT(config, device="meta")):
        assert drop_path_rates(model) == pytest.approx(reference, abs=1e-8)


def test_tinys_drop_path_rates_are_the_papers():
    rates = drop_path_rates(crossvit_torch.create_model("ti", drop_path_rate=0.1, device="meta"))
    narrow = [rates.get(f"blocks.{stage}.blocks.0.0.drop_path1", 0.0) for stage in range(3)]
    fusion = [rates[f"blocks.{stage}.fusion.1.drop_path"] for stage in range(3)]
    assert narrow == pytest.approx([0, 0.03636, 0.07273], abs=5e-6)
    assert fusion == pytest.approx([0.02727, 0.06364, 0.1], abs=5e-6)


def test_every_dropout_sits_where_timm_has_it():
    reference = timm.create_model(TIMM_NAMES["9"], img_size=120, device="meta", **RATES)
    flax = abstract("9", image_size=120, **RATES)
    twin = crossvit_torch.create_model("9", image_size=120, device="meta", **RATES)
    assert set(dropout_rates(reference).values()) == {0.1, 0.15, 0.2, 0.25}
    assert dropout_rates(flax) == dropout_rates(twin) == dropout_rates(reference)


def test_drop_path_shows_its_rate_as_timms_does():
    assert repr(TorchDropPath(0.125)) == repr(timm.layers.DropPath(0.125)) == "DropPath(drop_prob=0.125)"
    assert "rate=0.125" in repr(DropPath(0.125))


def drop(framework: str, flax_layer, torch_layer, x: np.ndarray) -> np.ndarray:
    """The layer in training mode on x."""
    if framework == "flax":
        return np.asarray(flax_layer(jnp.asarray(x), rngs=nnx.Rngs(dropout=0)))
    torch.manual_seed(0)
    return torch_layer(torch.tensor(x)).numpy()


@pytest.mark.parametrize("framework", ["flax", "torch"])
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_drop_path_drops_whole_samples_and_keeps_the_mean(framework, rate):
    out = drop(framework, DropPath(rate), TorchDropPath(rate), np.ones((SAMPLES, 3, 2), np.float32))
    assert (out == out[:, :1, :1]).all()  # a sample goes as a whole
    kept = out[:, 0, 0]
    np.testing.assert_allclose(kept[kept != 0], 1 / (1 - rate), rtol=1e-6)
    deviation = (rate * (1 - rate) / SAMPLES) ** 0.5  # of the share that is dropped
    assert abs((kept == 0).mean() - rate) < 5 * deviation
    assert abs(out.mean() - 1) < 5 * deviation / (1 - rate)


@pytest.mark.parametrize("framework", ["flax", "torch"])
def test_dropout_drops_single_values_and_keeps_the_mean(framework):
    rate = 0.25
    out = drop(framework, nnx.Dropout(rate), torch.nn.Dropout(rate), np.ones((SAMPLES // 4, 4), np.float32))
    deviation = (rate * (1 - rate) / SAMPLES) ** 0.5
    assert abs((out == 0).mean() - rate) < 5 * deviation
    assert abs(out.mean() - 1) < 5 * deviation / (1 - rate)
    assert abs(np.corrcoef(out[:, 0], out[:, 1])[0, 1]) < 5 / out.shape[0] ** 0.5  # each value on its own


class TestWholeModel:
    @pytest.fixture(scope="class")
    @classmethod
    def parts(cls):
        model = crossvit_jax.create_model("9", rngs=nnx.Rngs(0), **SHALLOW, **RATES)
        x = jnp.asarray(channels_last(images(120, batch=4)), jnp.float32)
        train, params = nnx.split(model)
        model.eval()
        return train, nnx.graphdef(model), params, x

    def test_the_key_decides_what_is_dropped(self, parts):
        train, _, params, x = parts
        run = jax.jit(lambda key: nnx.merge(train, params)(x, rngs=nnx.Rngs(dropout=key)))
        first = run(jax.random.key(0))
        np.testing.assert_array_equal(first, run(jax.random.key(0)))
        assert not np.allclose(first, run(jax.random.key(1)))

    def test_evaluation_mode_drops_nothing_and_needs_no_key(self, parts):
        _, evaluate, params, x = parts
        plain = abstract("9", **SHALLOW)
        expected = jax.jit(lambda: nnx.merge(nnx.graphdef(plain), params)(x))()
        np.testing.assert_array_equal(jax.jit(lambda: nnx.merge(evaluate, params)(x))(), expected)

    def test_view_reaches_every_layer_that_drops(self, parts):
        train, _, params, x = parts
        view = nnx.view(nnx.merge(train, params), deterministic=True)
        layers = [module for _, module in nnx.iter_modules(view) if isinstance(module, DropPath | nnx.Dropout)]
        assert layers and all(layer.deterministic for layer in layers)
        nnx.eval_shape(lambda: view(x))  # needs no key

    def test_training_mode_without_a_key_is_refused(self, parts):
        train, _, params, x = parts
        with pytest.raises(ValueError, match="pass rngs="):
            nnx.eval_shape(lambda: nnx.merge(train, params)(x))


def test_attention_dropout_is_exact_in_folded_cross_attention():
    """Dropped weights no longer sum to 1, so the value bias must shrink with them: compared with the plain order."""
    layer = crossvit_jax.attention.CrossAttention(24, 3, attn_drop=0.5, rngs=nnx.Rngs(0))
    layer.wv.bias[...] = jnp.arange(24.0)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 13, 24)), jnp.float32)

    def heads(y):
        return y.reshape(5, -1, 3, 8).transpose(0, 2, 1, 3)

    q, k, v = heads(layer.wq(x[:, :1])), heads(layer.wk(x)), heads(layer.wv(x))
    attn = nnx.Dropout(0.5)(jax.nn.softmax(q @ k.mT * layer.scale)[:, :, 0], rngs=nnx.Rngs(dropout=7))
    expected = layer.proj((attn[:, :, None] @ v).transpose(0, 2, 1, 3).reshape(5, 1, 24))
    np.testing.assert_allclose(layer(x, rngs=nnx.Rngs(dropout=7)), expected, rtol=1e-4, atol=1e-5)
