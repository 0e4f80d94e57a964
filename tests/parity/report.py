"""`python -m tests.parity.report [VARIANT ...]`: the largest errors of the Flax model against timm, as a table."""

import argparse
import sys
from collections.abc import Sequence

from tqdm import tqdm

from crossvit_jax.config import list_variants
from tests.parity.reference import GRADIENT_VARIANTS, PRECISIONS, output_errors, whole_gradient_errors
from tests.parity.training import STEPS, training_errors

HEADINGS = ["variant"] + [f"{what}, {p}" for p in PRECISIONS for what in ("logits", "features", "gradient")]


def row(variant: str) -> list[str]:
    """A variant's largest errors, each ÷ max|reference|; the gradient's is that of its worst parameter."""
    cells = [variant]
    for precision in PRECISIONS:
        errors = output_errors(variant, precision)["flax"]
        cells += [f"{errors['logits']:.1e}", f"{max(errors['branch 0'], errors['branch 1']):.1e}"]
        if variant in GRADIENT_VARIANTS:
            _, parts = whole_gradient_errors(variant, precision)
            cells.append(f"{max(parts.values()):.1e}")
        else:
            cells.append("-")
    return cells


def table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [HEADINGS, ["---"] * len(HEADINGS), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.parity.report", description=__doc__)
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help="short names; default: all")
    variants = parser.parse_args(argv).variants or list_variants()
    if unknown := set(variants) - set(list_variants()):
        parser.error(f"unknown variant {', '.join(unknown)}; known: {', '.join(list_variants())}")
    rows = [row(variant) for variant in tqdm(variants, unit="variant", file=sys.stderr)]
    print("Largest difference between Flax and timm ÷ largest value of timm's, all parameters perturbed:\n")
    print(table(rows))
    for precision in PRECISIONS:
        errors = training_errors(precision)
        print(
            f"\n{STEPS} training steps (AdamW) of ti in {precision}: losses within {errors['loss']:.1e}, "
            f"parameters within {errors['parameters']:.1e} (absolute)."
        )


if __name__ == "__main__":
    main()
