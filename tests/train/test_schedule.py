"""The learning rate of every epoch, against timm's own scheduler and against IBM's loop around it."""

import dataclasses

import numpy as np
import pytest
import torch
from timm.scheduler import CosineLRScheduler

from train.config import RECIPES, TrainConfig
from train.schedule import learning_rates


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
        scheduler.step(epoch + 1 if config.lr_stepping == "timm" else epoch)
    return rates


@pytest.mark.parametrize("stepping", ["timm", "ibm"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_epoch_of_a_recipe_equals_timms_scheduler(recipe, stepping):
    config = dataclasses.replace(RECIPES[recipe], lr_stepping=stepping)
    np.testing.assert_allclose(learning_rates(config), _timm_rates(config), rtol=1e-14)


@pytest.mark.parametrize("stepping", ["timm", "ibm"])
def test_without_warm_up_it_equals_timms_scheduler(stepping):
    config = TrainConfig(epochs=7, warmup_epochs=0, lr_stepping=stepping)
    np.testing.assert_allclose(learning_rates(config), _timm_rates(config), rtol=1e-14)


@pytest.mark.parametrize(
    ("stepping", "expected"),
    [
        ("ibm", [1e-6, 1e-6, 4.008e-4, 1.600e-3, 1.999e-3, 1.998e-3, 1.0218e-5]),
        ("timm", [1e-6, 4.008e-4, 8.006e-4, 1.999e-3, 1.998e-3, 1.997e-3, 1.0055e-5]),
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
