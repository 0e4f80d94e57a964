"""The learning rate of every epoch, against timm's own scheduler and against IBM's loop around it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from timm.scheduler import CosineLRScheduler, PolyLRScheduler

from train.config import TrainConfig
from train.optim.schedule import learning_rate, learning_rates, make_schedule
from train.recipes import RECIPES


def _timm_rates(config: TrainConfig) -> list[float]:
    """The rates of a training loop around timm's scheduler, stepped as `config.lr_stepping` says."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.peak_lr)
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=config.epochs,
        lr_min=config.min_lr,
        warmup_t=config.warmup_epochs,
        warmup_lr_init=config.warmup_lr,
    )
    rates = []
    for epoch in range(config.epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(epoch + 1 if config.lr_stepping == "epoch" else epoch)
    return rates


@pytest.mark.parametrize("stepping", ["epoch", "epoch-late"])
@pytest.mark.parametrize("recipe", [name for name, recipe in RECIPES.items() if recipe.lr_schedule == "cosine"])
def test_every_epoch_of_a_recipe_equals_timms_scheduler(recipe, stepping):
    config = dataclasses.replace(RECIPES[recipe], lr_stepping=stepping)
    np.testing.assert_allclose(learning_rates(config), _timm_rates(config), rtol=1e-14)


@pytest.mark.parametrize("stepping", ["epoch", "epoch-late"])
def test_without_warm_up_it_equals_timms_scheduler(stepping):
    config = TrainConfig(epochs=7, warmup_epochs=0, lr_stepping=stepping)
    np.testing.assert_allclose(learning_rates(config), _timm_rates(config), rtol=1e-14)


def test_a_line_equals_timms_polynomial_of_power_1():
    config = TrainConfig(epochs=20, warmup_epochs=4, lr_schedule="linear")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.peak_lr)
    scheduler = PolyLRScheduler(
        optimizer, t_initial=20, power=1.0, lr_min=config.min_lr, warmup_t=4, warmup_lr_init=config.warmup_lr
    )
    expected = []
    for epoch in range(config.epochs):
        expected.append(optimizer.param_groups[0]["lr"])
        scheduler.step(epoch + 1)
    np.testing.assert_allclose(learning_rates(config), expected, rtol=1e-13)


def test_a_constant_stays_at_the_peak_after_the_warm_up():
    config = TrainConfig(epochs=6, warmup_epochs=2, lr_schedule="constant", warmup_lr=0.0)
    np.testing.assert_allclose(learning_rates(config), config.peak_lr * np.array([0, 0.5, 1, 1, 1, 1]))


@pytest.mark.parametrize("recipe", ["imagenet", "transfer", "digits"])
def test_stepped_each_step_it_equals_timms_scheduler_on_updates(recipe):
    config = dataclasses.replace(RECIPES[recipe], lr_stepping="step", epochs=12, warmup_epochs=3)
    steps_per_epoch = 7
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.peak_lr)
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=12 * steps_per_epoch,
        lr_min=config.min_lr,
        warmup_t=3 * steps_per_epoch,
        warmup_lr_init=config.warmup_lr,
        t_in_epochs=False,
    )
    expected = []
    for step in range(12 * steps_per_epoch):
        expected.append(optimizer.param_groups[0]["lr"])
        scheduler.step_update(step + 1)
    told = [learning_rate(config, step, steps_per_epoch=steps_per_epoch) for step in range(12 * steps_per_epoch)]
    np.testing.assert_allclose(told, expected, rtol=1e-13)
    trained_at = jax.vmap(make_schedule(config, steps_per_epoch=steps_per_epoch))(jnp.arange(12 * steps_per_epoch))
    np.testing.assert_allclose(trained_at, expected, rtol=1e-5)


def test_what_is_told_is_what_is_trained_at_where_the_rate_changes_with_the_epoch():
    config = TrainConfig(epochs=4, warmup_epochs=1)
    schedule = make_schedule(config, steps_per_epoch=3)
    for step in range(12):
        assert learning_rate(config, step, steps_per_epoch=3) == pytest.approx(float(schedule(jnp.int32(step))))


@pytest.mark.parametrize(
    ("stepping", "expected"),
    [
        ("epoch-late", [1e-6, 1e-6, 4.008e-4, 1.600e-3, 1.999e-3, 1.998e-3, 1.0218e-5]),
        ("epoch", [1e-6, 4.008e-4, 8.006e-4, 1.999e-3, 1.998e-3, 1.997e-3, 1.0055e-5]),
    ],
)
def test_known_values_of_both_steppings(stepping, expected):
    config = TrainConfig(lr=2e-3, lr_batch_size=512, batch_size=512, warmup_epochs=5, lr_stepping=stepping)
    rates = learning_rates(config)[[0, 1, 2, 5, 6, 7, 299]]
    np.testing.assert_allclose(rates, expected, rtol=5e-4)


def test_only_the_peak_is_scaled_with_the_batch():
    small, large = (TrainConfig(batch_size=batch_size) for batch_size in (512, 4096))
    assert small.peak_lr == pytest.approx(5e-4)
    assert large.peak_lr == pytest.approx(4e-3)  # the paper's value
    assert learning_rates(small)[0] == learning_rates(large)[0] == small.warmup_lr
    assert learning_rates(small)[-1] == pytest.approx(small.min_lr, rel=2e-3)
