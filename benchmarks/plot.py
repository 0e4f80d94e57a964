"""The ratios as a picture: how fast Flax is beside the best of timm, for each benchmark, variant and batch."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.result import Content, Result, best, failed, gpus, rounds, times_as_fast
from convert.errors import SettingsError
from train.pictures.figure import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOUR, _NEUTRAL = "#4c72b0", "#555555"


def draw_ratios(contents: Sequence[Content], path: Path) -> None:
    """Draw a panel for each benchmark of models and machine, with the range of the rounds' ratios as whiskers.

    Raises SettingsError if no result has both Flax and timm, NotWritten if the picture cannot be written.
    """
    panels: dict[tuple[str, str], list[Result]] = {}
    for content in contents:
        devices = {"cpu": content["machine"]["cpu"], "gpu": ", ".join(gpus(content)[:1])}
        for result in content["results"]:
            if "flax" in rounds(result) and best(result, "timm"):
                place = f"{devices[result['device']]}, {result['dtype']}"
                panels.setdefault((content["benchmark"], place), []).append(result)
    if not panels:
        raise SettingsError("no result has both Flax and timm")
    widths = [max(2.5, len(results)) for results in panels.values()]
    figure = new_figure(figsize=(max(5, 0.8 + 0.64 * sum(widths)), 3.4), layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharey=True, width_ratios=widths, squeeze=False)[0]
    for axes, (title, results) in zip(all_axes, panels.items(), strict=True):
        axes.set_title("\n".join(title), fontsize=9.5)
        # those of a variant side by side, variants as they first come, smaller batches first
        variants = list(dict.fromkeys(result["variant"] for result in results))
        _draw_panel(axes, sorted(results, key=lambda result: (variants.index(result["variant"]), result["batch_size"])))
    all_axes[0].set_ylabel("times as fast as timm's best")
    has_hollow = any(_is_invalid(result) for results in panels.values() for result in results)
    note = "; hollow: not valid as a comparison, see the notes under the tables" * has_hollow
    figure.supxlabel(f"variant, and batch{note}", fontsize=9)
    save_figure(figure, path)


def _draw_panel(axes: "Axes", results: Sequence[Result]) -> None:
    axes.axhline(1, color=_NEUTRAL, lw=0.8)
    box = {"fc": "white", "ec": "none", "alpha": 0.8, "pad": 0.5}
    for x, result in enumerate(results):
        y, least, most = times_as_fast(rounds(result)["flax"], rounds(result)[best(result, "timm")])
        filling = "white" if _is_invalid(result) else _COLOUR
        dot = {"fmt": "o", "color": _COLOUR, "mfc": filling, "ms": 5, "capsize": 3, "lw": 1.2}
        axes.errorbar(x, y, [[y - least], [most - y]], **dot)
        axes.annotate(f"{y:.2f}", (x, y), (5, 0), textcoords="offset points", fontsize=8.5, va="center", bbox=box)
    names = [f"{result['variant']}\n{result['batch_size']}" for result in results]
    axes.set_xticks(range(len(names)), names, fontsize=9)
    axes.set_xlim(-0.6, len(names) - 0.1)
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _is_invalid(result: Result) -> bool:
    return result["disturbed"] or bool(failed(result, "timm"))
