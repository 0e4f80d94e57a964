"""How near half precision comes to the exact logits, beside timm in bfloat16 and under torch's autocast."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from crossvit_jax import CrossViT, CrossViTDetector, CrossViTSegmenter
from crossvit_jax.config import get_config
from crossvit_jax.kernels.layers import plain_wide_einsum, wide_einsum
from crossvit_jax.pretraining.dino import DinoCrossViT
from crossvit_jax.pretraining.masked import MaskedCrossViT
from tests.parity.precision import MEASURED, bfloat16_distances, digits
from tests.parity.reference import images, timm_model
from tests.small_model import small_config, small_detector, small_segmenter
from tests.train.small_weights import small_timm_model
from tests.train.steps import classification
from train.config import TrainConfig
from train.optim.state import abstract_model


@pytest.fixture(scope="module")
def distances():
    config = get_config("ti", image_size=120)  # few tokens; the depth is that of the paper
    return bfloat16_distances(timm_model("ti", "float32", image_size=120), config, images(120, batch=16))


@pytest.fixture(scope="module")
def after_training():
    """Those of a small model that timm has trained on the digits, with the gradient's."""
    torch.manual_seed(0)
    config, model = small_config(10), small_timm_model(10)
    pixels, labels = digits(config, training=True)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=5e-3)
    for step in range(240):
        chosen = np.random.default_rng(step).choice(len(pixels), 32)
        loss = torch.nn.functional.cross_entropy(model(torch.tensor(pixels[chosen])), torch.tensor(labels[chosen]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pixels, labels = digits(config, training=False)
    return bfloat16_distances(model.eval(), config, pixels[:64], labels[:64])


def _ratios(distances, ours, timms, measured):
    return {what: getattr(distances[ours], what) / getattr(distances[timms], what) for what in measured}


def test_bfloat16_is_nearer_to_float64_than_timms_model_of_bfloat16(distances):
    assert max(_ratios(distances, "ours", "timm", ("logits", "features")).values()) < 1.0
    assert _ratios(distances, "ours", "timm, autocast", ("logits",))["logits"] < 1.4


def test_with_a_float32_residual_it_is_as_near_as_timm_under_autocast(distances):
    assert max(_ratios(distances, "ours, float32 residual", "timm, autocast", ("logits", "features")).values()) < 1.1


def test_so_it_is_after_training_and_the_gradient_too(after_training):
    assert after_training["float64"].top1 > 80
    of_timms_model = _ratios(after_training, "ours", "timm", MEASURED)
    assert of_timms_model.pop("gradient") < 1.05
    assert max(of_timms_model.values()) < 1.0
    assert max(_ratios(after_training, "ours, float32 residual", "timm, autocast", MEASURED).values()) < 1.1


def test_sums_of_half_precision_stay_in_float32_and_gradients_are_rounded_before_they_are_multiplied():
    a, b, d_y = (jnp.asarray(np.random.default_rng(seed).standard_normal((9, 9)), jnp.float32) for seed in range(3))
    half = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    y, backward = jax.vjp(lambda a, b: wide_einsum("ij,jk->ik", a, b), *half)
    exact, plain = jax.vjp(lambda a, b: plain_wide_einsum("ij,jk->ik", a, b), *half)
    np.testing.assert_array_equal(y, exact)
    np.testing.assert_allclose(y, half[0].astype(jnp.float32) @ half[1].astype(jnp.float32), rtol=0, atol=1e-6)
    products = [line for line in str(jax.make_jaxpr(backward)(d_y)).splitlines() if "dot_general" in line]
    assert len(products) == 2 and all("f32" not in line for line in products)
    for ours, jaxs in zip(backward(d_y), plain(d_y), strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(ours.astype(jnp.float32), jaxs.astype(jnp.float32), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_a_runs_setting_reaches_the_model(precision):
    config = TrainConfig(variant="9", precision=precision, fp32_residual=True)
    model = abstract_model(classification(config, 10), config)
    assert model.residual_dtype == jnp.float32
    half = precision == "bfloat16"
    layers = model.blocks[0].blocks[0][0]
    assert [layer.wide for layer in (layers.attn.proj, layers.mlp.fc2, layers.mlp.fc1)] == [half, half, False]


@pytest.mark.parametrize(
    "build",
    [
        lambda **kwargs: CrossViTDetector(small_detector(), **kwargs),
        lambda **kwargs: CrossViTSegmenter(small_segmenter(), **kwargs),
        lambda **kwargs: MaskedCrossViT(small_config(0), **kwargs),
        lambda **kwargs: DinoCrossViT(small_config(0), 12, **kwargs),
    ],
    ids=["detection", "segmentation", "simmim", "dino"],
)
def test_what_other_tasks_train_takes_it_too(build):
    model = nnx.eval_shape(lambda: build(dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    model.set_fp32_residual()
    (body,) = [module for _, module in nnx.iter_modules(model) if isinstance(module, CrossViT)]
    assert (body.dtype, body.residual_dtype) == (jnp.bfloat16, jnp.float32)
    assert body.blocks[0].blocks[0][0].mlp.fc2.wide
