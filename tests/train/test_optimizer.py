"""Which parameters decay, and when the learning rate changes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import timm
import torch
from flax import nnx
from timm.optim import param_groups_weight_decay

from convert import to_torch
from crossvit_jax import get_config
from train.config import RECIPES
from train.optimizer import decay_mask, make_optimizer
from train.schedule import learning_rates
from train.state import abstract_model


def test_the_same_parameters_decay_as_in_timm():
    ours = abstract_model(get_config("9-dagger"))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), nnx.to_pure_dict(nnx.state(ours, nnx.Param)))
    mask = decay_mask(params, ours.no_weight_decay())
    marked = jax.tree.map(lambda param, decays: np.full_like(param, decays), params, mask)
    decaying = {name for name, value in to_torch(marked).items() if value.all()}

    model = timm.create_model("crossvit_9_dagger_240")
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    expected = {id(param) for group in groups if group["weight_decay"] > 0 for param in group["params"]}
    assert decaying == {name for name, param in model.named_parameters() if id(param) in expected}


def test_the_learning_rate_changes_with_the_epoch_only():
    config = dataclasses.replace(RECIPES["digits"], epochs=4, warmup_epochs=1, weight_decay=0.0)
    optimizer = make_optimizer(config, steps_per_epoch=3)
    params = {"w": jnp.zeros((2, 2))}
    state = optimizer.init(params)
    moved = []
    for _ in range(15):
        updates, state = optimizer.update({"w": jnp.ones((2, 2))}, state, params)
        moved.append(-float(updates["w"][0, 0]))  # with equal gradients Adam moves by the learning rate
    rates = learning_rates(config)
    np.testing.assert_allclose(moved, np.repeat(np.append(rates, rates[-1]), 3), rtol=1e-4)


def test_the_update_is_that_of_torch():
    config = dataclasses.replace(RECIPES["digits"], epochs=2, warmup_epochs=0, weight_decay=0.05)
    rates = learning_rates(config)
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=(5, 3)), rng.normal(size=(8, 5, 3))

    with jax.enable_x64(True):
        optimizer = make_optimizer(config, steps_per_epoch=4)
        params = {"w": jnp.asarray(start)}
        state = optimizer.init(params)
        for gradient in gradients:
            updates, state = optimizer.update({"w": jnp.asarray(gradient)}, state, params)
            params = jax.tree.map(lambda param, update: param + update, params, updates)

    weight = torch.nn.Parameter(torch.tensor(start))
    reference = torch.optim.AdamW([weight], weight_decay=0.05)
    for step, gradient in enumerate(gradients):
        reference.param_groups[0]["lr"] = rates[step // 4]
        weight.grad = torch.tensor(gradient)
        reference.step()
    assert params["w"].dtype == np.float64
    np.testing.assert_allclose(params["w"], weight.detach().numpy(), rtol=1e-12)
