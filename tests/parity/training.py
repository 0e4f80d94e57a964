"""The same training steps in timm + torch.optim and in Flax + optax."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import timm.optim
import torch
from flax import nnx
from timm.data.mixup import mixup_target
from timm.loss import SoftTargetCrossEntropy
from timm.scheduler import CosineLRScheduler

from convert.tree import flatten
from tests.parity.reference import channels_last, flax_twin, timm_model
from tests.train.steps import make_train_step
from train.optim.optimizer import make_optimizer
from train.optim.state import make_state
from train.recipes import RECIPES

STEPS, STEPS_PER_EPOCH, BATCH, CLASSES = 20, 5, 8, 10
MODEL = {"image_size": 48, "image_scale": (1.0, 2 / 3), "num_classes": CLASSES}
# the recipe's optimiser, schedule and loss; what draws random numbers is off
CONFIG = dataclasses.replace(
    RECIPES["imagenet"],
    epochs=STEPS // STEPS_PER_EPOCH,
    warmup_epochs=1,
    lr=1e-3,
    batch_size=BATCH,
    lr_batch_size=BATCH,
    drop_path=0.0,
    mixup=0.0,
    cutmix=0.0,
)


@dataclass
class Run:
    losses: np.ndarray
    weights: dict[str, np.ndarray]


def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(step)
    return rng.standard_normal((BATCH, 3, 48, 48)), rng.integers(CLASSES, size=BATCH)


def timm_run(precision: str) -> tuple[dict, Run]:
    """timm's initial weights, and what timm and torch.optim make of them."""
    dtype = getattr(torch, precision)
    model = timm_model("ti", precision, **MODEL).train()
    start = {name: x.clone() for name, x in model.state_dict().items()}
    groups = timm.optim.param_groups_weight_decay(
        model, CONFIG.weight_decay, no_weight_decay_list=model.no_weight_decay()
    )
    optimizer = torch.optim.AdamW(groups, lr=CONFIG.peak_lr, betas=(0.9, 0.999), eps=1e-8)
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=CONFIG.epochs,
        lr_min=CONFIG.min_lr,
        warmup_t=CONFIG.warmup_epochs,
        warmup_lr_init=CONFIG.warmup_lr,
    )
    torch.set_default_dtype(dtype)  # timm makes the targets in it; undone below
    losses = []
    for step in range(STEPS):
        schedule.step(step // STEPS_PER_EPOCH)
        x, labels = batch(step)
        targets = mixup_target(torch.tensor(labels), CLASSES, smoothing=CONFIG.smoothing)
        loss = SoftTargetCrossEntropy()(model(torch.tensor(x, dtype=dtype)), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    torch.set_default_dtype(torch.float32)
    return start, Run(np.array(losses), {name: x.numpy() for name, x in model.state_dict().items()})


def flax_run(start: dict, precision: str) -> Run:
    """The same with our model, optimiser and training step."""
    with jax.enable_x64(precision == "float64"):
        model = flax_twin("ti", start, precision, **MODEL)
        optimizer = make_optimizer(CONFIG, steps_per_epoch=STEPS_PER_EPOCH, no_weight_decay=model.no_weight_decay())
        state = make_state(nnx.to_pure_dict(nnx.state(model, nnx.Param)), optimizer, CONFIG)
        train_step = jax.jit(make_train_step(model, optimizer, CONFIG))
        losses = []
        for step in range(STEPS):
            x, labels = batch(step)
            inputs = {"image": jnp.asarray(channels_last(x), precision), "label": jnp.asarray(labels, jnp.int32)}
            state, metrics = train_step(state, inputs)
            losses.append(float(metrics["loss"]))
        return Run(np.array(losses), {name: np.asarray(x) for name, x in flatten(state["params"]).items()})


def training_errors(precision: str) -> dict[str, float]:
    """Largest absolute differences after the steps: of the losses, and of the parameters."""
    start, expected = timm_run(precision)
    result = flax_run(start, precision)
    assert result.weights.keys() == expected.weights.keys()
    moved = [np.abs(expected.weights[name] - x.numpy()).max() for name, x in start.items() if "wk.bias" not in name]
    return {
        "loss": float(np.abs(result.losses - expected.losses).max()),
        "parameters": max(float(np.abs(result.weights[n] - w).max()) for n, w in expected.weights.items()),
        "moved": float(min(moved)),  # how far the parameter that moved least has gone
        "learned": float(expected.losses[0] - expected.losses[-1]),
    }
