"""What fewer tokens cost and bring: accuracy on scikit-learn's digits, speed beside all tokens. See fewer-tokens.md.

    python docs/fewer_tokens_digits.py FOLDER            # Ti learns the digits, at 48 pixels and then at 120
    python docs/fewer_tokens_digits.py FOLDER --speed    # Ti and S at 240 pixels, on an idle machine

The first trains a model, then evaluates it with each setting, at once and after 3 more epochs with it. The second takes
turns in one process. Each writes a JSON file; where both are there, a table and a picture are made.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from digits_runs import evaluated, trained

# At 120 pixels the wide branch has a quarter of the patches that it has at 240: merging r there is merging 4 r here.
SETTINGS = {  # at 120 pixels: at 240
    "merge:1": "merge:4",
    "merge:2": "merge:8",
    "merge:3": "merge:12",
    "fusion:0.7": "fusion:0.7",
    "fusion:0.7,0.7": "fusion:0.7,0.7",
    "prune:0.7": "prune:0.7",
}
RECIPE = ["--recipe=digits"]
SIZE = ["--image-size=120", "--image-scale=1,14/15"]
TUNING = ["--epochs=3", "--lr=3e-4", "--warmup-lr=3e-5"]
VARIANTS, BATCHES, ROUNDS = ("ti", "s"), (8, 32), 9


def top1(weights: str, setting: str, output: Path) -> float:
    """In per cent, of the held-out digits."""
    flags = (f"--weights={weights}", "--dataset=digits", f"--reduce-tokens={setting}")
    return evaluated(*flags, output=output)["top1"]


def measure_accuracy(folder: Path, *, epochs: int) -> dict[str, dict[str, float]]:
    """Of each setting at 120 pixels: top-1 at once, and after the short fine-tuning. "none" was fine-tuned too."""
    small = trained(*RECIPE, "--variant=ti", output=folder / "at-48")
    full = trained(*RECIPE, f"--init={small}:last", *SIZE, f"--epochs={epochs}", output=folder / "at-120")
    found = {}
    for setting in ("none", *SETTINGS):
        name = setting.replace(":", "-").replace(",", "-")
        flags = [*RECIPE, f"--init={full}:last", *SIZE, f"--reduce-tokens={setting}", *TUNING]
        tuned = trained(*flags, output=folder / f"tuned-{name}")
        found[setting] = {
            "at once": top1(f"{full}:last", setting, folder / f"at-once-{name}"),
            "tuned": top1(f"{tuned}:last", setting, folder / f"evaluated-{name}"),
        }
    return found


def measure_speed() -> list[dict[str, object]]:
    """Of each variant, batch and setting at 240 pixels: how many times as fast as with all tokens, in turns."""
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from tqdm import tqdm

    from crossvit_jax import create_model

    rows = []
    for variant in VARIANTS:
        models = {name: create_model(variant, reduce_tokens=name, rngs=nnx.Rngs(0)) for name in SETTINGS.values()}
        models = {"none": create_model(variant, rngs=nnx.Rngs(0)), **models}
        for model in models.values():
            model.eval()
        for batch in BATCHES:
            images = jax.random.normal(jax.random.key(0), (batch, 240, 240, 3), jnp.float32)
            programs = {}
            for name, model in tqdm(models.items(), desc=f"{variant}, batch {batch}: compiling", file=sys.stderr):
                graphdef, params = nnx.split(model)
                call = jax.jit(lambda params, images, graphdef=graphdef: nnx.merge(graphdef, params)(images))
                programs[name] = (call, params)
                jax.block_until_ready(call(params, images))
            times = {name: [] for name in programs}
            for _ in tqdm(range(ROUNDS), desc="rounds", file=sys.stderr):
                for name, (call, params) in programs.items():
                    start = time.perf_counter()
                    jax.block_until_ready(call(params, images))
                    times[name].append(time.perf_counter() - start)
            for name in programs:
                ratios = [full / own for full, own in zip(times["none"], times[name], strict=True)]
                row = {"variant": variant, "batch": batch, "setting": name, "ratio": statistics.median(ratios)}
                rows.append({**row, "times": times[name]})
    return rows


def table(accuracy: dict[str, dict[str, float]], speed: list[dict]) -> list[str]:
    """Lines of Markdown: speed at 240 pixels, top-1 kept at 120."""
    columns = [(variant, batch) for variant in VARIANTS for batch in BATCHES]
    ratio = {(row["variant"], row["batch"], row["setting"]): row["ratio"] for row in speed}
    full = accuracy["none"]["at once"]
    lines = [
        "| setting | " + " | ".join(f"{v}, batch {b}" for v, b in columns) + " | top-1 kept | after 3 epochs |",
        "|" + " --- |" * (len(columns) + 3),
    ]
    for small, large in {"none": "none", **SETTINGS}.items():
        cells = [f"{ratio[(*column, large)]:.2f}" for column in columns]
        for value in accuracy[small].values():
            cells.append(f"{100 * value / full:.1f} % ({value:.2f})")
        lines.append(f"| {large}{f' ({small} at 120)' * (small != large)} | " + " | ".join(cells) + " |")
    return lines


def draw(accuracy: dict[str, dict[str, float]], speed: list[dict], file: Path) -> None:
    """Top-1 kept over the speed of Ti at batch 8."""
    import matplotlib.figure

    ratio = {row["setting"]: row["ratio"] for row in speed if (row["variant"], row["batch"]) == ("ti", 8)}
    figure = matplotlib.figure.Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(100, color="0.8", linewidth=1)
    full = accuracy["none"]["at once"]
    speeds = [ratio[large] for large in ("none", *SETTINGS.values())]
    kept = {key: [100 * accuracy[small][key] / full for small in ("none", *SETTINGS)] for key in ("at once", "tuned")}
    lows, highs = (list(map(of, *kept.values())) for of in (min, max))
    axes.vlines(speeds, lows, highs, color="0.8", linewidth=1, zorder=0)  # joins the two of a setting
    for key, label, marker in (("at once", "not trained for it", "o"), ("tuned", "after 3 epochs with it", "s")):
        axes.scatter(speeds, kept[key], marker=marker, label=label)
    for name, x, y in zip(("none", *SETTINGS.values()), speeds, lows, strict=True):
        axes.annotate(name, (x, y), textcoords="offset points", xytext=(0, -14), fontsize=9, ha="center")
    axes.margins(x=0.12, y=0.1)  # room for the names
    axes.set_xlabel("times as fast as with all tokens (Ti, 240 pixels, batch 8)")
    axes.set_ylabel("top-1 kept in % (digits, 120 pixels)")
    axes.legend(loc="lower left")
    figure.savefig(file, dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for runs and results; runs that are there are not done again")
    parser.add_argument("--epochs", type=int, default=25, help="at 120 pixels with all tokens (default: %(default)s)")
    parser.add_argument("--speed", action="store_true", help="measure speed, not accuracy")
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    results = {name: args.folder / f"{name}.json" for name in ("accuracy", "speed")}
    if args.speed:
        results["speed"].write_text(json.dumps(measure_speed()))
    else:
        results["accuracy"].write_text(json.dumps(measure_accuracy(args.folder, epochs=args.epochs)))
    if all(file.exists() for file in results.values()):
        accuracy, speed = (json.loads(file.read_text()) for file in results.values())
        draw(accuracy, speed, args.folder / "fewer-tokens.png")
        print(*table(accuracy, speed), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
