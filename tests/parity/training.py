"""The same training steps in timm + torch.optim and in Flax + optax."""

import dataclasses
from collections.abc import Callable
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
from timm.utils import ModelEmaV3, dispatch_clip_grad

import crossvit_jax
from convert.tree import flatten
from tests.parity.reference import channels_last, flax_module, flax_twin, timm_model
from tests.small_model import small_config
from tests.train.small_weights import small_timm_model
from tests.train.steps import make_train_step
from train.config import TrainConfig
from train.optim.optimizer import make_optimizer
from train.optim.state import make_state
from train.recipes import RECIPES

STEPS, FEW_STEPS, STEPS_PER_EPOCH, BATCH, CLASSES = 20, 7, 5, 8, 10
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


CLIPPED_AND_AVERAGED = dataclasses.replace(CONFIG, clip_grad=1.0, ema_decay=0.8)


@dataclass
class Run:
    losses: np.ndarray
    weights: dict[str, np.ndarray]
    averaged: dict[str, np.ndarray]  # the weights' moving average; the weights themselves where there is none
    norms: list[float] = dataclasses.field(default_factory=list)  # of the gradients before they are clipped


Batches = Callable[[int], tuple[np.ndarray, np.ndarray]]  # of a step: images, channels first, and labels


def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(step)
    return rng.standard_normal((BATCH, 3, 48, 48)), rng.integers(CLASSES, size=BATCH)


def timm_run(
    model: torch.nn.Module,
    precision: str,
    config: TrainConfig,
    steps: int = STEPS,
    *,
    batches: Batches = batch,
    steps_per_epoch: int = STEPS_PER_EPOCH,
    autocast: bool = False,
) -> Run:
    """What timm and torch.optim make of a timm model, as timm's train.py does it; in bfloat16 with `autocast`."""
    dtype = getattr(torch, precision)
    groups = timm.optim.param_groups_weight_decay(
        model, config.weight_decay, no_weight_decay_list=model.no_weight_decay()
    )
    optimizer = torch.optim.AdamW(groups, lr=config.peak_lr, betas=(0.9, 0.999), eps=1e-8)
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=config.epochs,
        lr_min=config.min_lr,
        warmup_t=config.warmup_epochs,
        warmup_lr_init=config.warmup_lr,
    )
    averaged = ModelEmaV3(model, decay=config.ema_decay)
    torch.set_default_dtype(dtype)  # timm makes the targets in it; undone below
    losses, norms = [], []
    for step in range(steps):
        schedule.step(step // steps_per_epoch)
        x, labels = batches(step)
        targets = mixup_target(torch.tensor(labels), CLASSES, smoothing=config.smoothing)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(torch.tensor(x, dtype=dtype))
        loss = SoftTargetCrossEntropy()(logits.to(dtype), targets)
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.get_total_norm([x.grad for x in model.parameters()])))
        if config.clip_grad is not None:
            dispatch_clip_grad(model.parameters(), config.clip_grad)
        optimizer.step()
        averaged.update(model, step=step + 1)
        losses.append(loss.item())
    torch.set_default_dtype(torch.float32)
    weights, means = ({name: x.numpy() for name, x in m.state_dict().items()} for m in (model, averaged.module))
    return Run(np.array(losses), weights, means, norms)


def flax_run(
    model: nnx.Module,
    precision: str,
    config: TrainConfig,
    steps: int = STEPS,
    *,
    batches: Batches = batch,
    steps_per_epoch: int = STEPS_PER_EPOCH,
) -> Run:
    """The same with our optimiser and training step. For float64, call it inside `jax.enable_x64(True)`.

    Args:
        precision: of images, parameters and optimiser; the model computes in its own.
    """
    optimizer = make_optimizer(config, steps_per_epoch=steps_per_epoch, no_weight_decay=model.no_weight_decay())
    state = make_state(nnx.to_pure_dict(nnx.state(model, nnx.Param)), optimizer, config)
    train_step = jax.jit(make_train_step(model, optimizer, config))
    losses = []
    for step in range(steps):
        x, labels = batches(step)
        inputs = {"image": jnp.asarray(channels_last(x), precision), "label": jnp.asarray(labels, jnp.int32)}
        state, metrics = train_step(state, inputs)
        losses.append(float(metrics["loss"]))
    trees = (state["params"], state.get("ema", state["params"]))
    return Run(np.array(losses), *({name: np.asarray(x) for name, x in flatten(tree).items()} for tree in trees))


def training_errors(precision: str) -> dict[str, float]:
    """Largest absolute differences after the steps of ti: of the losses, and of the parameters."""
    reference = timm_model("ti", precision, **MODEL).train()
    start = {name: x.clone() for name, x in reference.state_dict().items()}
    with jax.enable_x64(precision == "float64"):
        result = flax_run(flax_twin("ti", start, precision, **MODEL), precision, CONFIG)
    return _errors(start, result, timm_run(reference, precision, CONFIG))


def clipped_and_averaged_errors() -> dict[str, float]:
    """The same of a small model in float64, gradients clipped, and of the moving average of its weights."""
    reference = small_timm_model(CLASSES).double().train()
    start = {name: x.clone() for name, x in reference.state_dict().items()}
    config = small_config(CLASSES)
    with jax.enable_x64(True):
        model = flax_module(lambda rngs: crossvit_jax.CrossViT(config, param_dtype=jnp.float64, rngs=rngs), start)
        result = flax_run(model, "float64", CLIPPED_AND_AVERAGED, FEW_STEPS)
    return _errors(start, result, timm_run(reference, "float64", CLIPPED_AND_AVERAGED, FEW_STEPS))


def _errors(start: dict[str, torch.Tensor], result: Run, expected: Run) -> dict[str, float]:
    assert result.weights.keys() == expected.weights.keys()
    moved = [np.abs(expected.weights[name] - x.numpy()).max() for name, x in start.items() if "wk.bias" not in name]
    clipped = CLIPPED_AND_AVERAGED.clip_grad
    return {
        "loss": float(np.abs(result.losses - expected.losses).max()),
        "parameters": _largest_difference(result.weights, expected.weights),
        "average": _largest_difference(result.averaged, expected.averaged),
        "lag": _largest_difference(expected.averaged, expected.weights),  # of the average behind the parameters
        "moved": float(min(moved)),  # how far the parameter that moved least has gone
        "learned": float(expected.losses[0] - expected.losses[-1]),
        "clipped": float(np.mean([norm > clipped for norm in expected.norms])),  # share of the steps
    }


def _largest_difference(result: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    return max(float(np.abs(result[name] - value).max()) for name, value in expected.items())
