"""Mixup and CutMix: with the same draws timm's pixels and targets; and draws of timm's distribution."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import stats
from timm.data.mixup import Mixup, cutmix_bbox_and_lam, mixup_target

from train.config import TrainConfig
from train.images.mixup import Mix, cutmix_box, draw_mix, mix_images, mix_targets
from train.recipes import RECIPES

_HEIGHT, _WIDTH = 30, 42
_DRAWS = 4000


def _mix(lam, box=(0, 0, 0, 0), cut=False) -> Mix:
    return Mix(lam=jnp.float32(lam), box=jnp.array(box, jnp.int32), cut=jnp.array(cut))


def _batch(size=6):
    return np.random.default_rng(0).normal(size=(size, _HEIGHT, _WIDTH, 3)).astype(np.float32)


def _timm_mixed(images, monkeypatch, *, lam, center=(0, 0), cut):
    """timm's `Mixup` on a batch, with its draws replaced: pixels (channels last) and lambda."""
    monkeypatch.setattr(Mixup, "_params_per_batch", lambda self: (lam, cut))
    draws = iter(center)
    monkeypatch.setattr(np.random, "randint", lambda low, high, size=None: next(draws))
    x = torch.tensor(images).permute(0, 3, 1, 2).clone()
    used = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=10)._mix_batch(x)
    return x.permute(0, 2, 3, 1).numpy(), used


@pytest.mark.parametrize("size", [6, 5])
def test_mixup_pixels_are_timms(monkeypatch, size):
    images = _batch(size)
    expected, _ = _timm_mixed(images, monkeypatch, lam=0.3, cut=False)
    np.testing.assert_allclose(mix_images(jnp.asarray(images), _mix(0.3)), expected, atol=1e-6)


@pytest.mark.parametrize("center", [(15, 20), (0, 0), (29, 41), (3, 40)])
@pytest.mark.parametrize("lam", [0.02, 0.5, 0.97, 0.9999])
def test_cutmix_pixels_box_and_corrected_lambda_are_timms(monkeypatch, lam, center):
    images = _batch()
    expected, expected_lam = _timm_mixed(images, monkeypatch, lam=lam, center=center, cut=True)
    box, corrected = cutmix_box(jnp.float32(lam), jnp.array(center), _HEIGHT, _WIDTH)
    assert float(corrected) == pytest.approx(expected_lam, abs=1e-6)
    mixed = mix_images(jnp.asarray(images), Mix(lam=corrected, box=box, cut=jnp.array(True)))
    np.testing.assert_array_equal(mixed, expected)


def test_an_unmixed_batch_is_left_alone_bit_for_bit():
    images = jnp.asarray(_batch())
    np.testing.assert_array_equal(mix_images(images, _mix(1.0)), images)


@pytest.mark.parametrize("broken", [np.nan, np.inf])
@pytest.mark.parametrize(("lam", "cut"), [(1.0, False), (0.7, True), (0.3, False)])
def test_broken_pixels_go_where_timm_lets_them_go(monkeypatch, broken, lam, cut):
    images = _batch()
    images[0, ::2] = broken
    expected, used = _timm_mixed(images, monkeypatch, lam=lam, center=(3, 4), cut=cut)
    box, _ = cutmix_box(jnp.float32(lam), jnp.array((3, 4)), _HEIGHT, _WIDTH)
    mixed = mix_images(jnp.asarray(images), Mix(lam=jnp.float32(used), box=box, cut=jnp.array(cut)))
    np.testing.assert_allclose(mixed, expected, atol=1e-6)
    assert np.isfinite(mixed[-1]).all() == (lam == 1)


@pytest.mark.parametrize("lam", [1.0, 0.37])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_targets_are_timms(lam, smoothing):
    labels = np.array([3, 1, 4, 1, 5, 9])
    expected = mixup_target(torch.tensor(labels), 10, lam, smoothing)
    targets = mix_targets(jnp.asarray(labels), jnp.float32(lam), num_classes=10, smoothing=smoothing)
    np.testing.assert_allclose(targets, expected.numpy(), atol=1e-6)
    np.testing.assert_allclose(targets.sum(-1), 1, atol=1e-6)


def _draw_many(config: TrainConfig) -> Mix:
    keys = jax.random.split(jax.random.key(0), _DRAWS)
    draws = jax.jit(jax.vmap(lambda key: draw_mix(key, config, height=_HEIGHT, width=_WIDTH)))(keys)
    return Mix(*map(np.asarray, draws))


def _timm_draws() -> dict[str, np.ndarray]:
    """What timm draws with the paper's settings: lambdas of Mixup, and boxes and corrected lambdas of CutMix."""
    np.random.seed(0)
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=10)
    lam, cut = map(np.array, zip(*(mixup._params_per_batch() for _ in range(_DRAWS)), strict=True))
    boxes = [cutmix_bbox_and_lam((_HEIGHT, _WIDTH), each) for each in lam[cut]]
    return {
        "mixup_lam": lam[~cut],
        "box": np.array([box for box, _ in boxes]),
        "cutmix_lam": np.array([corrected for _, corrected in boxes]),
    }


def test_draws_have_timms_distribution():
    ours, timms = _draw_many(RECIPES["imagenet"]), _timm_draws()
    assert stats.binomtest(int(ours.cut.sum()), _DRAWS, 0.5).pvalue > 1e-3
    assert stats.ks_2samp(ours.lam[~ours.cut], timms["mixup_lam"]).pvalue > 1e-3
    assert stats.ks_2samp(ours.lam[ours.cut], timms["cutmix_lam"]).pvalue > 1e-3
    for side in range(4):
        assert stats.ks_2samp(ours.box[ours.cut, side], timms["box"][:, side]).pvalue > 1e-3
    top, bottom, left, right = ours.box[ours.cut].T
    np.testing.assert_allclose(ours.lam[ours.cut], 1 - (bottom - top) * (right - left) / (_HEIGHT * _WIDTH), atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "cut_share", "mixed_share"),
    [
        ({"mixup": 0.0}, 1.0, 1.0),
        ({"cutmix": 0.0}, 0.0, 1.0),
        ({"mixup": 0.0, "cutmix": 0.0}, 0.0, 0.0),
        ({"mix_prob": 0.25}, 0.125, 0.25),
        ({"cutmix_share": 0.1}, 0.1, 1.0),
    ],
)
def test_settings_choose_how_many_batches_are_mixed_and_how(settings, cut_share, mixed_share):
    draws = _draw_many(dataclasses.replace(RECIPES["imagenet"], **settings))
    assert draws.cut.mean() == pytest.approx(cut_share, abs=0.03)
    # a box of CutMix can be empty, so that lambda is 1 again
    assert (draws.cut | (draws.lam < 1)).mean() == pytest.approx(mixed_share, abs=0.03)
