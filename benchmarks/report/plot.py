"""The ratios as a picture: how fast Flax is beside the best of timm, for each benchmark, variant and batch."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.report.goals import TIMES_AS_FAST
from benchmarks.result import Content, Result, best, counts, device_name, rounds, times_as_fast
from train.pictures.figure import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {"flax": "#4c72b0", "flax-cudnn": "#dd8452"}
_NEUTRAL = "#555555"
_BETWEEN_SIDES = 0.3  # of the distance between results


def draw_ratios(contents: Sequence[Content], path: Path) -> None:
    """Draw a panel for each benchmark and machine, with the range of the rounds' ratios as whiskers, and the goal.

    Args:
        contents: of JSON files of `benchmarks.inference` and `training`.
        path: of the PNG to write or replace.

    Raises:
        ValueError: no result has both Flax and timm.
        NotWritten: the picture cannot be written.
    """
    panels: dict[tuple[str, str], list[Result]] = {}
    for content in contents:
        for result in content["results"]:
            if best(result, "flax") and best(result, "timm"):
                where = f"{device_name(content, result['device'])}, {result['dtype']}"
                panels.setdefault((content["benchmark"], where), []).append(result)
    if not panels:
        raise ValueError("no result has both Flax and timm")
    widths = [max(3, len(results)) for results in panels.values()]
    figure = new_figure(figsize=(max(6, 1 + 0.95 * sum(widths)), 4.5), layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharey=True, width_ratios=widths, squeeze=False)[0]
    for axes, (title, results) in zip(all_axes, panels.items(), strict=True):
        axes.set_title("\n".join(title), fontsize=10)
        # those of a variant side by side, variants as they first come, smaller batches first
        variants = list(dict.fromkeys(result["variant"] for result in results))
        _draw_panel(axes, sorted(results, key=lambda result: (variants.index(result["variant"]), result["batch_size"])))
    all_axes[0].set_ylabel("times as fast as the best of timm")
    legend = {
        label: handle for axes in all_axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(legend.values(), legend, loc="outside lower center", ncols=len(legend), frameon=False, fontsize=9)
    save_figure(figure, path)


def _draw_panel(axes: "Axes", results: Sequence[Result]) -> None:
    goal = TIMES_AS_FAST[results[0]["device"]]
    axes.axhline(1, color=_NEUTRAL, lw=0.8)
    axes.axhline(goal, color=_NEUTRAL, lw=1.2, ls="--", label="goal")
    sides = [side for side in _COLOURS if any(side in rounds(result) for result in results)]
    for place, result in enumerate(results):
        for number, side in enumerate(side for side in sides if side in rounds(result)):
            ratio = times_as_fast(rounds(result)[side], rounds(result)[best(result, "timm")])
            x, y = place + _BETWEEN_SIDES * (number - (len(sides) - 1) / 2), ratio["ratio"]
            whiskers = [[y - ratio["min"]], [ratio["max"] - y]]
            filling = _COLOURS[side] if counts(result) else "white"
            axes.errorbar(x, y, whiskers, fmt="o", color=_COLOURS[side], mfc=filling, ms=6, capsize=4, lw=1.2)
            box = {"fc": "white", "ec": "none", "alpha": 0.8, "pad": 0.5}
            axes.annotate(f"{y:.2f}", (x, y), (6, 0), textcoords="offset points", fontsize=8, va="center", bbox=box)
    for side in sides:
        axes.plot([], [], "o", color=_COLOURS[side], label=side)
    if not all(counts(result) for result in results):
        axes.plot([], [], "o", color=_NEUTRAL, mfc="white", label="not valid: see the notes under the tables")
    names = [f"{result['variant']}\nbatch {result['batch_size']}" for result in results]
    axes.set_xticks(range(len(names)), names, fontsize=9)
    axes.set_xlim(-0.6, len(names) - 0.3)
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
