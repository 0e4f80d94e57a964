"""Which parameters decay, and when the learning rate changes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import timm
import timm.optim
import torch
from flax import nnx
from timm.optim import param_groups_weight_decay

from convert import to_torch
from crossvit_jax import get_config
from tests.train.steps import abstract_classifier
from train.optim.optimizer import decay_mask, layer_scales, make_optimizer
from train.optim.schedule import learning_rate, learning_rates
from train.recipes import RECIPES


def test_the_same_parameters_decay_as_in_timm():
    ours = abstract_classifier(get_config("9-dagger"))
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


def test_tokens_and_positions_decay_where_that_is_wanted():
    config = dataclasses.replace(RECIPES["imagenet-ibm"], warmup_epochs=0, lr_stepping="epoch", weight_decay=0.5)
    params = {"pos_embed_0": jnp.ones((1, 3, 2)), "norm": {"scale": jnp.ones(2)}}
    zeros = jax.tree.map(jnp.zeros_like, params)
    moved = []
    for settings in (config, dataclasses.replace(config, decay_tokens=False)):
        optimizer = make_optimizer(settings, steps_per_epoch=1, no_weight_decay={"pos_embed_0"})
        updates, _ = optimizer.update(zeros, optimizer.init(params), params)
        moved.append({name: bool(jnp.any(jax.tree.leaves(update)[0])) for name, update in updates.items()})
    assert moved == [{"pos_embed_0": True, "norm": False}, {"pos_embed_0": False, "norm": False}]


def test_the_learning_rate_falls_from_the_heads_to_the_image_once_per_block():
    model = abstract_classifier(get_config("9"))  # three stages of three blocks
    scales = layer_scales(nnx.to_pure_dict(nnx.state(model, nnx.Param)), 0.5, model.layer_of)

    def of(tree):
        (scale,) = set(jax.tree.leaves(tree))
        return scale

    stages = [scales["blocks"][stage] for stage in range(3)]
    blocks = [[of(stage["blocks"][1][i]) for i in range(3)] + [of(stage["fusion"])] for stage in stages]
    assert np.ravel(blocks).tolist() == [0.5**power for power in range(12, 0, -1)]
    assert [of(stage["projs"]) == of(stage["revert_projs"]) == of(stage["fusion"]) for stage in stages] == [True] * 3
    assert [of(stage["blocks"][0]) for stage in stages] == [row[0] for row in blocks]  # the narrow branch's only block
    assert {of(scales[name]) for name in ("patch_embed", "cls_token_0", "pos_embed_1")} == {0.5**13}
    assert {of(scales[name]) for name in ("norm", "head")} == {1.0}


def test_layer_decay_scales_the_whole_update_as_a_learning_rate_would():
    config = dataclasses.replace(RECIPES["digits"], warmup_epochs=0, layer_decay=0.25)
    params = {"head": {"kernel": jnp.ones((2, 2))}, "pos_embed_0": jnp.ones((1, 2, 2))}
    gradients = jax.tree.map(lambda x: 0.1 * x, params)
    optimizer = make_optimizer(config, steps_per_epoch=1, layer_of={"pos_embed_0": 0, "head.kernel": 1}.get)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    np.testing.assert_allclose(updates["pos_embed_0"][0], 0.25 * updates["head"]["kernel"], rtol=1e-6)


def test_the_weight_decay_of_dino_goes_along_its_cosine():
    settings = {"weight_decay_end": 0.4, "epochs": 2, "warmup_epochs": 0, "clip_grad": None, "lr": 0.1}
    config, start = dataclasses.replace(RECIPES["dino-digits"], **settings), np.arange(1.0, 7.0).reshape(2, 3)
    weight = torch.nn.Parameter(torch.tensor(start))
    reference = torch.optim.AdamW([weight])
    with jax.enable_x64(True):
        optimizer = make_optimizer(config, steps_per_epoch=3)
        params = {"w": jnp.asarray(start)}
        state = optimizer.init(params)
        for step in range(6):
            updates, state = optimizer.update({"w": jnp.asarray(np.sin(start * step))}, state, params)
            params = jax.tree.map(jnp.add, params, updates)
            decay = 0.4 + 0.5 * (0.04 - 0.4) * (1 + np.cos(np.pi * step / 6))  # main_dino.py, cosine_scheduler
            reference.param_groups[0] |= {
                "lr": learning_rate(config, step, steps_per_epoch=3),
                "weight_decay": decay,
            }
            weight.grad = torch.tensor(np.sin(start * step))
            reference.step()
    np.testing.assert_allclose(params["w"], weight.detach().numpy(), rtol=1e-12)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("clip", [None, 1e-3, 1.5, 1e3])
def test_the_update_is_that_of_torch(kind, clip):
    settings = {"optimizer": kind, "clip_grad": clip, "epochs": 2, "warmup_epochs": 0, "weight_decay": 0.05}
    config = dataclasses.replace(RECIPES["digits"], **settings)
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
    reference = (
        torch.optim.AdamW([weight], weight_decay=0.05)
        if kind == "adamw"
        else timm.optim.create_optimizer_v2([weight], opt="sgd", weight_decay=0.05, momentum=0.9)
    )
    for step, gradient in enumerate(gradients):
        reference.param_groups[0]["lr"] = rates[step // 4]
        weight.grad = torch.tensor(gradient)
        if clip is not None:
            assert (torch.nn.utils.clip_grad_norm_([weight], clip) > clip) == (clip < 1e3)
        reference.step()
    assert params["w"].dtype == np.float64
    np.testing.assert_allclose(params["w"], weight.detach().numpy(), rtol=1e-12)
