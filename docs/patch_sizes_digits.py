"""Accuracy of one set of weights at several patch sizes, on scikit-learn's digits at 48 pixels: see patch-sizes.md.

    python docs/patch_sizes_digits.py FOLDER

Ti learns the digits twice, with the same number of steps: with its own patch size, and with one drawn for each step.
Both are evaluated at each size, the latter also with one chosen for each picture.
"""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from digits_runs import evaluated, trained

SETTINGS = ["--recipe=digits", "--variant=ti"]
OWN = "12,16"
SIZES = ("24,32", OWN, "6,16")  # the mean of their work, which is that of pictures in equal shares, is about its own


class Auto(NamedTuple):
    """What came of a size chosen for each picture."""

    top1: float  # per cent
    counts: dict[str, int]  # pictures of each size


def measure(folder: Path, *, epochs: int) -> tuple[dict[str, float], dict[str, dict[str, float]], Auto]:
    """GMAC by size, top-1 in per cent by weights and size, and what came of a size for each picture."""
    usual = (*SETTINGS, f"--epochs={epochs}")
    runs = {
        "fixed": trained(*usual, output=folder / "fixed"),
        "flexible": trained(*usual, "--patch-sizes", *SIZES, output=folder / "flexible"),
    }
    top1 = {
        kind: {size: _evaluated(run, size, folder / f"{kind}-{size}")["top1"] for size in SIZES}
        for kind, run in runs.items()
    }
    return gmacs(), top1, auto_of(_evaluated(runs["flexible"], "auto", folder / "auto"))


def _evaluated(run: Path, size: str, output: Path) -> dict[str, object]:
    return evaluated(f"--weights={run}:last", "--dataset=digits", f"--patch-size={size}", output=output)


def gmacs() -> dict[str, float]:
    """Of a picture, by size."""
    from train.cost.flops import macs_per_image
    from train.main import parse_flags

    config = parse_flags(SETTINGS).model_config(10)
    return {size: macs_per_image(config.at_patch_size(tuple(map(int, size.split(","))))) / 1e9 for size in SIZES}


def auto_of(figures: Mapping[str, object]) -> Auto:
    """What an evaluation with `--patch-size auto` told."""
    (line,) = re.findall(r"images by patch size (.*);", str(figures["printed"]))
    counts = {size: int(count) for size, count in re.findall(r"(\d+,\d+): (\d+)", line)}
    return Auto(float(figures["top1"]), counts)


def table(gmac: Mapping[str, float], top1: Mapping[str, Mapping[str, float]], auto: Auto) -> list[str]:
    """Lines of Markdown: sizes by their work, then `auto`, then the same shares of pictures drawn blindly."""
    lines = ["| patches | GMAC | plain resizing | flexible training | pictures by `auto` |", "|" + " --- |" * 5]
    total = sum(auto.counts.values())
    for size in sorted(gmac, key=gmac.get):
        name = f"{size} (own)" if size == OWN else size
        cells = [f"{top1[kind][size]:.2f} %" for kind in ("fixed", "flexible")]
        lines.append(f"| {name} | {gmac[size]:.4f} | {' | '.join(cells)} | {auto.counts.get(size, 0)} |")

    def mean(values: Mapping[str, float]) -> float:
        return sum(count * values[size] for size, count in auto.counts.items()) / total

    work = f"{mean(gmac):.4f}"
    lines.append(f"| `auto` | {work} | - | {auto.top1:.2f} % | {total} |")
    lines.append(f"| as many of each size, whichever | {work} | - | {mean(top1['flexible']):.2f} % | {total} |")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for runs and evaluations; those that are there are not done again")
    parser.add_argument("--epochs", type=int, default=14, help="of each training (default: %(default)s)")
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    lines = table(*measure(args.folder, epochs=args.epochs))
    (args.folder / "table.md").write_text("\n".join(lines) + "\n")
    print(*lines, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
