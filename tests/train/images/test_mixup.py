"""Mixup and CutMix: with the same draws timm's pixels and targets; and draws of timm's distribution."""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import stats
from timm.data.mixup import Mixup, cutmix_bbox_and_lam, mixup_target

from convert.errors import SettingsError
from tests.compilation import xla_flags
from tests.train.steps import classification
from train.config import TrainConfig
from train.devices.mesh import make_mesh
from train.images.mixup import Mix, cutmix_box, draw_mix, mix_images, mix_in_groups, mix_targets
from train.job import mix_group
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


# --- groups ---

_KEY = jax.random.key(3)


def _prepared(images, key=_KEY, **settings):
    """Images and targets as a training step takes them; the labels are the places."""
    config = dataclasses.replace(RECIPES["imagenet"], batch_size=len(images), **settings)
    batch = {"image": jnp.asarray(images), "label": jnp.arange(len(images))}
    return classification(config, 10).prepare(batch, key)


def test_each_group_is_mixed_in_itself_as_a_batch_of_its_own():
    images = _batch(6)
    whole = _prepared(images, mix_group=2)
    for place, key in enumerate(jax.random.split(_KEY, 3)):
        part = slice(2 * place, 2 * place + 2)
        alone = _prepared(images[part], key)
        np.testing.assert_allclose(whole["image"][part], alone["image"], atol=1e-6)
    # an image has a share in its own label and in that of its partner in the group, and lambda is each group's own
    shares = np.asarray(whole["targets"]) - 0.01
    lams = [shares[place, place] for place in (0, 2, 4)]
    assert len(set(lams)) == 3
    for place, lam in enumerate(np.repeat(lams, 2)):
        expected = np.zeros(10)
        expected[place], expected[place ^ 1] = lam, 0.9 - lam
        np.testing.assert_allclose(shares[place], expected, atol=1e-6)


@pytest.mark.parametrize("group", [6, 64])
def test_a_group_of_the_whole_batch_is_the_batch_bit_for_bit(group):
    images = _batch(6)
    for name, expected in _prepared(images).items():
        np.testing.assert_array_equal(_prepared(images, mix_group=group)[name], expected)


def test_groups_have_chances_of_their_own():
    mixup = dataclasses.replace(RECIPES["imagenet"], cutmix=0.0)  # whose shares, other than those of boxes, all differ

    def lam(images, labels, key):
        return images, jnp.broadcast_to(draw_mix(key, mixup, height=30, width=42).lam, (len(images), 1))

    _, lams = mix_in_groups(lam, jnp.zeros((2000, 1, 1, 1)), jnp.zeros(2000, jnp.int32), _KEY, group=2)
    lams = np.asarray(lams).reshape(1000, 2)
    np.testing.assert_array_equal(lams[:, 0], lams[:, 1])
    assert len(np.unique(lams)) > 990
    assert np.abs(np.corrcoef(lams[:-1, 0], lams[1:, 0])[0, 1]) < 0.1


def test_a_batch_that_groups_do_not_fill_is_one_line():
    with pytest.raises(SettingsError, match="batch_size 96 cannot be cut into groups of mix_group 64 images"):
        dataclasses.replace(RECIPES["imagenet-ibm"], batch_size=96)


@pytest.mark.parametrize(
    ("recipe", "settings", "saved", "expected"),
    [
        ("imagenet", {}, None, 4096),
        ("imagenet", {"grad_accum": 4}, None, 1024),
        ("imagenet", {"mix_group": 128}, None, 128),
        ("imagenet-ibm", {}, None, 64),
        ("imagenet", {"batch_size": 512}, {"batch_size": 512, "mix_group": 32}, 32),
        ("imagenet", {"grad_accum": 4}, {"batch_size": 4096}, 4096),  # begun before there was the setting
        ("imagenet-ibm", {}, {"batch_size": 512}, 512),
    ],
)
def test_new_runs_mix_what_a_device_gets_at_a_time_and_begun_ones_what_they_did(recipe, settings, saved, expected):
    config = dataclasses.replace(RECIPES[recipe], **settings)
    assert mix_group(config, saved and {"train": saved}, make_mesh(devices=jax.devices()[:1])) == expected


_ON_DEVICES = """
import dataclasses
import jax, numpy as np
from train.cost.hlo import communication
from train.devices.mesh import batch_sharding, default_mix_group, make_mesh
from train.recipes import RECIPES
from tests.train.steps import classification

config = dataclasses.replace(RECIPES["imagenet"], batch_size=32)
rng = np.random.default_rng(0)
batch = {"image": rng.normal(size=(32, 20, 30, 3)).astype(np.float32), "label": np.arange(32) % 10}
prepared = []
for shape, devices in (("data=1", 1), ("data=8", 8), ("data=2,fsdp=4", 8)):
    mesh = make_mesh(shape, jax.devices()[:devices])
    if devices == 8:
        config = dataclasses.replace(config, mix_group=default_mix_group(config, mesh))
    else:
        config = dataclasses.replace(config, mix_group=4)
    cut = batch_sharding(mesh)
    prepare = jax.jit(classification(config, 10).prepare, in_shardings=(cut, None), out_shardings=cut)
    compiled = prepare.lower(batch, jax.random.key(1)).compile()
    sent = sum(traffic.sent for traffic in communication(compiled.as_text()).values())
    assert sent < 1000, communication(compiled.as_text())  # an image has 7,200 bytes
    prepared.append(compiled(jax.device_put(batch, cut), jax.random.key(1)))
for other in prepared[1:]:
    for name, value in prepared[0].items():
        np.testing.assert_allclose(other[name], value, atol=1e-6)
"""


def test_every_number_of_devices_mixes_the_same_and_sends_no_image():
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(devices=8)}
    done = subprocess.run([sys.executable, "-c", _ON_DEVICES], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
