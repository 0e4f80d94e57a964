"""`python -m tests.parity.precision [VARIANT ...]`: how near bfloat16 comes to the exact logits, beside timm."""

import argparse
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import torch
from tqdm import tqdm

from crossvit_jax import CrossViT
from crossvit_jax.config import get_config, list_variants
from tests.parity.reference import channels_last, flax_module, images, timm_model

OF_OURS = {"ours": False, "ours, float32 residual": True}  # the latter with `CrossViT.set_fp32_residual`


def bfloat16_distances(variant: str, *, batch: int, **settings) -> dict[str, float]:
    """Root mean squares of the differences between bfloat16 logits and those of float64, with perturbed weights.

    Of timm's model of bfloat16, of its float32 model under `torch.autocast`, and of ours.
    """
    config = get_config(variant, **settings)
    pixels = images(config.image_size, batch=batch)
    x = torch.tensor(pixels, dtype=torch.float32)
    model = timm_model(variant, "float32", **settings)
    weights = model.state_dict()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            logits = {"timm, autocast": model(x)}
        exact = model.double()(x.double()).numpy()
        logits["timm"] = model.bfloat16()(x.bfloat16())
    logits = {name: told.float().numpy() for name, told in logits.items()}
    model = flax_module(lambda rngs: CrossViT(config, dtype=jnp.bfloat16, rngs=rngs), weights)
    for name, enable in OF_OURS.items():
        model.set_fp32_residual(enable)
        logits[name] = jax.jit(lambda model, x: model(x))(model, channels_last(pixels).astype(np.float32))
    return {name: float(np.sqrt(np.square(np.asarray(told) - exact).mean())) for name, told in logits.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.parity.precision", description=__doc__)
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help="short names; default: ti 18 15-dagger")
    variants = parser.parse_args(argv).variants or ["ti", "18", "15-dagger"]
    if unknown := set(variants) - set(list_variants()):
        parser.error(f"unknown variant {', '.join(unknown)}; known: {', '.join(list_variants())}")
    told = [bfloat16_distances(variant, batch=4) for variant in tqdm(variants, unit="variant", file=sys.stderr)]
    print("RMS distance of bfloat16 logits from float64 ÷ that of timm, all parameters perturbed:\n")
    print("| variant | " + " | ".join(f"{name} ÷ {by}" for name in OF_OURS for by in ("timm, autocast", "timm")) + " |")
    print("|" + " --- |" * 5)
    for variant, each in zip(variants, told, strict=True):
        ratios = [each[name] / each[by] for name in OF_OURS for by in ("timm, autocast", "timm")]
        print(f"| {variant} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")


if __name__ == "__main__":
    main()
