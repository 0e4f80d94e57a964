"""`python -m tests.parity.precision_training`: what training in bfloat16 comes to, ours beside timm under autocast.

Ti learns the digits at 48 pixels in each precision from the same weights, batches, AdamW and schedule.
"""

import argparse
import dataclasses
import sys
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import timm
import torch
from tqdm import tqdm

from convert.command_line import run as run_command
from crossvit_jax import CrossViT
from crossvit_jax.config import get_config
from tests.parity.precision import digits
from tests.parity.reference import flax_module
from tests.parity.training import flax_run, timm_run
from train.recipes import RECIPES

RECIPE = RECIPES["digits"]
CONFIG = get_config("ti", image_size=48, image_scale=(1.0, 2 / 3), crop_pct=1.0, num_classes=10)
TIMM = {"timm, float32": False, "timm, autocast": True}
OURS = {
    "ours, float32": (jnp.float32, False),
    "ours": (jnp.bfloat16, False),
    "ours, float32 residual": (jnp.bfloat16, True),
}


class Trained(NamedTuple):
    train_loss: float  # mean of the last 20 steps
    loss: float  # of the held-out digits, in float32
    top1: float  # of them, in per cent


def train_each(epochs: int, seed: int, progress: tqdm) -> dict[str, Trained]:
    """Trains from timm's weights of that seed in each precision."""
    config = dataclasses.replace(RECIPE, epochs=epochs)
    pixels, labels = digits(CONFIG, training=True)
    steps_per_epoch = len(pixels) // config.batch_size
    drawn = np.random.default_rng(seed)
    order = np.concatenate(
        [drawn.permutation(len(pixels))[: steps_per_epoch * config.batch_size] for _ in range(epochs)]
    )

    def batches(step: int) -> tuple[np.ndarray, np.ndarray]:
        progress.update()
        chosen = order[step * config.batch_size :][: config.batch_size]
        return pixels[chosen], labels[chosen]

    schedule = {"steps": steps_per_epoch * epochs, "batches": batches, "steps_per_epoch": steps_per_epoch}
    results = {}
    for side in (*TIMM, *OURS):
        torch.manual_seed(seed)
        model = timm.create_model("crossvit_tiny_240", num_classes=10, img_size=48, img_scale=(1.0, 2 / 3)).train()
        if side in TIMM:
            run = timm_run(model, "float32", config, autocast=TIMM[side], **schedule)
        else:
            dtype, fp32_residual = OURS[side]
            ours = flax_module(lambda rngs, dtype=dtype: CrossViT(CONFIG, dtype=dtype, rngs=rngs), model.state_dict())
            ours.set_fp32_residual(fp32_residual)
            run = flax_run(ours, "float32", config, **schedule)
        model.load_state_dict({name: torch.tensor(x) for name, x in run.weights.items()}, strict=True)
        results[side] = Trained(float(np.mean(run.losses[-20:])), *_held_out(model))
    return results


def _held_out(model: torch.nn.Module) -> tuple[float, float]:
    """Loss and top-1 in per cent."""
    pixels, labels = digits(CONFIG, training=False)
    with torch.no_grad():
        logits = model.eval()(torch.tensor(pixels))
    right = (logits.argmax(1).numpy() == labels).mean()
    return torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).item(), 100 * float(right)


def _program() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.parity.precision_training", description=__doc__)
    parser.add_argument("--epochs", type=int, default=RECIPE.epochs, metavar="N", help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each; default: %(default)s")
    args = parser.parse_args()
    if min(args.epochs, args.seeds) < 2:
        parser.error(f"--epochs and --seeds must be 2 or more; got {args.epochs} and {args.seeds}")
    steps = args.seeds * len(TIMM | OURS) * args.epochs * (len(digits(CONFIG, training=True)[1]) // RECIPE.batch_size)
    with tqdm(total=steps, unit="step", file=sys.stderr) as progress:
        told = [train_each(args.epochs, seed, progress) for seed in range(args.seeds)]
    print(f"Means of {args.seeds} seeds (their standard deviation), {args.epochs} epochs of digits:\n")
    print("| | training loss | held-out loss | held-out top-1 |\n| --- | --- | --- | --- |")
    for side in told[0]:
        values = np.array([run[side] for run in told])
        mean, deviation = values.mean(0), values.std(0, ddof=1)
        cells = [f"{m:.{n}f} ({d:.{n}f})" for m, d, n in zip(mean, deviation, (4, 4, 2), strict=True)]
        print(f"| {side} | " + " | ".join(cells) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("python -m tests.parity.precision_training", _program))
