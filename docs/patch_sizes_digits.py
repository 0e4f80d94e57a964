"""Accuracy of one set of weights at several patch sizes, on scikit-learn's digits at 48 pixels: see patch-sizes.md.

    python docs/patch_sizes_digits.py FOLDER

Ti learns the digits three times, with the same number of steps: with its own patch size; with one drawn for each step;
and so again from the weights of the first. All are evaluated at each size, the latter two also with one chosen for each
picture.
"""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from digits_runs import evaluated, trained

SETTINGS = ["--recipe=digits", "--variant=ti"]
KINDS = {"fixed": "plain resizing", "flexible": "flexible training", "continued": "the same from the fixed weights"}
OWN = "12,16"
SIZES = ("24,32", OWN, "6,16")  # the mean of their work, which is that of pictures in equal shares, is about its own


def measure(folder: Path, *, epochs: int) -> tuple[dict[str, dict[str, float]], dict[str, int]]:
    """Top-1 in per cent by weights and size, also of `auto`, and how many pictures that gave each size."""
    usual = (*SETTINGS, f"--epochs={epochs}")
    fixed = trained(*usual, output=folder / "fixed")
    usual = (*usual, "--patch-sizes", *SIZES)
    runs = {
        "fixed": fixed,
        "flexible": trained(*usual, output=folder / "flexible"),
        "continued": trained(*usual, f"--init={fixed}:last", output=folder / "continued"),
    }
    top1, printed = {}, ""
    for kind, run in runs.items():
        top1[kind] = {}
        for size in SIZES if kind == "fixed" else (*SIZES, "auto"):
            flags = (f"--weights={run}:last", "--dataset=digits", f"--patch-size={size}")
            figures = evaluated(*flags, output=folder / f"{kind}-{size}")
            top1[kind][size], printed = figures["top1"], figures["printed"]
    return top1, counts_of(printed)


def gmacs() -> dict[str, float]:
    """Of a picture, by size."""
    from train.cost.flops import macs_per_image
    from train.main import parse_flags

    config = parse_flags(SETTINGS).model_config(10)
    return {size: macs_per_image(config.at_patch_size(tuple(map(int, size.split(","))))) / 1e9 for size in SIZES}


def counts_of(printed: str) -> dict[str, int]:
    """How many pictures an evaluation with `--patch-size auto` gave each size, by what it printed."""
    (line,) = re.findall(r"images by patch size (.*);", printed)
    return {size: int(count) for size, count in re.findall(r"(\d+,\d+): (\d+)", line)}


def table(gmac: Mapping[str, float], top1: Mapping[str, Mapping[str, float]], counts: Mapping[str, int]) -> list[str]:
    """Lines of Markdown: sizes by their work, then `auto`, then the same shares of pictures drawn blindly."""
    total = sum(counts.values())

    def mean(values: Mapping[str, float]) -> float:
        return sum(count * values[size] for size, count in counts.items()) / total

    def line(name: str, work: float, values: Mapping[str, float], pictures: int) -> str:
        cells = [f"{values[kind]:.2f} %" if kind in values else "-" for kind in KINDS]
        return f"| {name} | {work:.4f} | {' | '.join(cells)} | {pictures} |"

    lines = [f"| patches | GMAC | {' | '.join(KINDS.values())} | pictures by `auto` |", "|" + " --- |" * 6]
    for size in sorted(gmac, key=gmac.get):
        name = f"{size} (own)" if size == OWN else size
        lines.append(line(name, gmac[size], {kind: top1[kind][size] for kind in top1}, counts.get(size, 0)))
    flexible = [kind for kind in KINDS if kind != "fixed"]
    lines.append(line("`auto`", mean(gmac), {kind: top1[kind]["auto"] for kind in flexible}, total))
    blind = {kind: mean(top1[kind]) for kind in flexible}
    return [*lines, line("as many of each size, whichever", mean(gmac), blind, total)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for runs and evaluations; those that are there are not done again")
    parser.add_argument("--epochs", type=int, default=14, help="of each training (default: %(default)s)")
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    lines = table(gmacs(), *measure(args.folder, epochs=args.epochs))
    (args.folder / "table.md").write_text("\n".join(lines) + "\n")
    print(*lines, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
