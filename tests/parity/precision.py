"""`python -m tests.parity.precision`: how near bfloat16 comes to float64, beside timm in bfloat16 and under autocast.

Of logits, features and gradients: of variants with perturbed weights, or of a model trained on the digits, which are
then its pictures.
"""

import argparse
import copy
import math
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from tqdm import tqdm

from convert import load_weights
from convert.command_line import run as run_command
from convert.errors import UserError
from convert.tree import flatten
from crossvit_jax import CrossViT
from crossvit_jax.config import CrossViTConfig, get_config, list_variants
from crossvit_jax.preprocess import normalised
from tests.parity.reference import channels_last, flax_module, images, timm_model, timm_outputs
from train.data.datasets import open_digits
from train.images.transforms import eval_transform

OURS = {"ours": False, "ours, float32 residual": True}  # the latter with `CrossViT.set_fp32_residual`
TIMMS = ("timm, autocast", "timm")
MEASURED = ("logits", "features", "gradient")


class Computed(NamedTuple):
    """What one side makes of a batch."""

    logits: np.ndarray
    features: np.ndarray  # the normalised tokens of both branches
    gradient: dict[str, np.ndarray]  # of the cross-entropy, by timm's names
    loss: float


class Distances(NamedTuple):
    """How far one side is from float64: root mean squares, of the gradient the median parameter's.

    A parameter's is a share of the root mean square of its own gradient.
    """

    logits: float
    features: float
    gradient: float
    loss: float  # the side's own, no distance
    top1: float  # its own, in per cent


def bfloat16_distances(
    model: torch.nn.Module, config: CrossViTConfig, pixels: np.ndarray, labels: np.ndarray | None = None
) -> dict[str, Distances]:
    """Those of timm's model of bfloat16, of its float32 model under `torch.autocast`, and of ours; "float64": none.

    Args:
        model: timm's of float32, with any weights, in evaluation mode.
        pixels: (batch, channels, height, width), normalised.
        labels: (batch,), integers; without them there is neither gradient nor loss.
    """
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    exact = _of_timm(copy.deepcopy(model).double(), torch.float64, pixels, labels)
    computed = {}
    with torch.autocast("cpu", torch.bfloat16):
        computed["timm, autocast"] = _of_timm(model, torch.float32, pixels, labels)
    computed["timm"] = _of_timm(copy.deepcopy(model).bfloat16(), torch.bfloat16, pixels, labels)
    for name, enable in OURS.items():
        ours = flax_module(lambda rngs: CrossViT(config, dtype=jnp.bfloat16, rngs=rngs), weights)
        ours.set_fp32_residual(enable)
        computed[name] = _of_flax(ours, pixels, labels)
    return {name: _distances(side, exact, labels) for name, side in {"float64": exact, **computed}.items()}


def _of_timm(model: torch.nn.Module, dtype: torch.dtype, pixels: np.ndarray, labels: np.ndarray | None) -> Computed:
    with torch.set_grad_enabled(labels is not None):
        logits, *features = timm_outputs(model, torch.tensor(pixels, dtype=dtype))
    gradient, loss = {}, math.nan
    if labels is not None:
        # as in training: in float32 or wider
        loss = torch.nn.functional.cross_entropy(
            logits.to(torch.promote_types(dtype, torch.float32)), torch.tensor(labels)
        )
        names, parameters = zip(*model.named_parameters(), strict=True)
        gradient = dict(zip(names, map(_numbers, torch.autograd.grad(loss, parameters)), strict=True))
        loss = loss.item()
    return Computed(_numbers(logits), _flat([_numbers(x) for x in features]), gradient, loss)


def _numbers(x: torch.Tensor) -> np.ndarray:
    return x.detach().double().numpy()


def _of_flax(model: CrossViT, pixels: np.ndarray, labels: np.ndarray | None) -> Computed:
    graphdef, params = nnx.split(model)

    def loss(params, x):
        model = nnx.merge(graphdef, params)
        features = model.forward_features(x)
        logits = model.forward_head(features)
        if labels is None:
            return math.nan, (logits, features)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
        return -chosen.mean(), (logits, features)

    x = channels_last(pixels).astype(np.float32)
    if labels is None:
        (value, (logits, features)), gradient = jax.jit(loss)(params, x), {}
    else:
        (value, (logits, features)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, x)
    features = _flat([np.asarray(x, np.float64) for x in features])
    return Computed(np.asarray(logits), features, flatten(gradient), float(value))


def _flat(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([x.ravel() for x in arrays])


def _distances(side: Computed, exact: Computed, labels: np.ndarray | None) -> Distances:
    # the key bias of a cross-attention moves all scores alike: its gradient is 0, and what is computed is rounding
    shares = (
        [math.nan]
        if labels is None
        else [
            _rms(side.gradient[name] - expected) / _rms(expected)
            for name, expected in exact.gradient.items()
            if not name.endswith("wk.bias")
        ]
    )
    top1 = math.nan if labels is None else 100 * float((side.logits.argmax(1) == labels).mean())
    distances = _rms(side.logits - exact.logits), _rms(side.features - exact.features), float(np.median(shares))
    return Distances(*distances, side.loss, top1)


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.square(np.asarray(x, np.float64)).mean()))


def perturbed_distances(variant: str, *, batch: int, **settings) -> dict[str, Distances]:
    """Those of a variant with perturbed weights; the images are noise, and the labels drawn."""
    config = get_config(variant, **settings)
    labels = np.random.default_rng(0).integers(config.num_classes, size=batch)
    model = timm_model(variant, "float32", **settings)
    return bfloat16_distances(model, config, images(config.image_size, batch=batch), labels)


def trained_distances(source: str, *, batch: int | None = None) -> dict[str, Distances]:
    """Those of a model that was trained on the digits; the images are held-out digits.

    Raises UserError if it is no two-branch model of a variant with ten classes.
    """
    weights = load_weights(source)
    config = weights.config
    if not isinstance(config, CrossViTConfig) or config.name not in list_variants() or config.num_classes != 10:
        raise UserError(f"--weights {source}: needs a variant trained on the digits; got {config.name}")
    settings = {"image_size": config.image_size, "image_scale": config.image_scale, "num_classes": 10}
    model = timm_model(config.name, "float32", **settings)
    model.load_state_dict({name: torch.tensor(x) for name, x in weights.tensors.items()}, strict=True)
    pixels, labels = digits(config, training=False)
    return bfloat16_distances(model, config, pixels[:batch], labels[:batch])


def digits(config: CrossViTConfig, *, training: bool) -> tuple[np.ndarray, np.ndarray]:
    """All pictures (n, 3, height, width) as an evaluation normalises them, and their labels."""
    sets, transform = open_digits(None), eval_transform(config)
    source = sets.train if training else sets.held_out
    samples = [transform(source[i]) for i in range(len(source))]
    pixels = normalised(np.stack([sample["image"] for sample in samples])).transpose(0, 3, 1, 2)
    return pixels, np.array([sample["label"] for sample in samples], np.int64)


def _table(told: dict[str, dict[str, Distances]]) -> list[str]:
    """Of each model a row for each of ours ÷ each of timm's."""
    lines = ["| model | sides | " + " | ".join(MEASURED) + " |", "|" + " --- |" * (2 + len(MEASURED))]
    for model, each in told.items():
        for ours in OURS:
            for timms in TIMMS:
                ratios = [getattr(each[ours], what) / getattr(each[timms], what) for what in MEASURED]
                lines.append(f"| {model} | {ours} ÷ {timms} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    return lines


def _program() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.parity.precision", description=__doc__)
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help="short names; default: ti 18 15-dagger")
    parser.add_argument("--weights", metavar="SOURCE", help="of a model trained on the digits, in place of variants")
    parser.add_argument("--batch", type=int, metavar="N", help="images; default: 4, held-out digits all")
    args = parser.parse_args()
    if unknown := set(args.variants) - set(list_variants()):
        parser.error(f"unknown variant {', '.join(unknown)}; known: {', '.join(list_variants())}")
    if args.weights is not None and args.variants:
        parser.error("--weights takes the place of variants: give one of them")
    if args.weights is None:
        variants = tqdm(args.variants or ["ti", "18", "15-dagger"], unit="variant", file=sys.stderr)
        told = {variant: perturbed_distances(variant, batch=args.batch or 4) for variant in variants}
    else:
        told = {args.weights: trained_distances(args.weights, batch=args.batch)}
    print("Distances of bfloat16 from float64, ours ÷ timm's; of the gradient the median parameter's:\n")
    print("\n".join(_table(told)))
    if args.weights is not None:
        print("\n| | loss | top-1 |\n| --- | --- | --- |")
        for side, each in told[args.weights].items():
            print(f"| {side} | {each.loss:.5f} | {each.top1:.2f} % |")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("python -m tests.parity.precision", _program))
