"""The curves of a run: loss, metrics and learning rate over its steps, and which epoch was best."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.pictures.figure import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from train.tasks.task import Metric

_TRAINING, _HELD_OUT, _AVERAGED, _NEUTRAL = "#4c72b0", "#dd8452", "#55a868", "#555555"
_FEW_POINTS = 40  # so many or fewer are marked one by one

# of the first metrics in a panel; a fifth looks like the first
_STYLES = ("-", ":", "--", "-.")

_Curve = tuple[str, str, str, str]  # a metric's name in the log, colour, line style and meaning


def _panels(metrics: "Sequence[Metric]") -> dict[str, list[_Curve]]:
    """The curves of each panel, by its label: the loss, the metrics of one unit together, the learning rate."""
    loss = [
        ("train/loss", _TRAINING, "-", "training"),
        ("eval/loss", _HELD_OUT, "-", "held out"),
        ("eval/ema_loss", _AVERAGED, "-", "held out, averaged weights"),
    ]
    units: dict[str, list[Metric]] = {}
    for metric in metrics:
        units.setdefault(metric.unit, []).append(metric)
    by_unit = {}
    for unit, alike in units.items():
        curves = by_unit[", ".join(metric.label for metric in alike) + f" in {unit}" * bool(unit)] = []
        for metric, style in zip(alike, itertools.cycle(_STYLES), strict=False):
            curves += [
                (f"train/{metric.name}", _TRAINING, style, f"training {metric.label}"),
                (f"eval/{metric.name}", _HELD_OUT, style, f"held-out {metric.label}"),
                (f"eval/ema_{metric.name}", _AVERAGED, style, "the same, averaged weights"),
            ]
    return {"loss": loss, **by_unit, "learning rate": [("train/lr", _NEUTRAL, "-", "learning rate")]}


def draw_curves(lines: Sequence[Mapping[str, Any]], metrics: "Sequence[Metric]", path: Path) -> None:
    """Draw loss, metrics and learning rate over the steps of a run, as far as it has come.

    Args:
        lines: those of `metrics.jsonl`: `step`, `epoch` and metrics by name, such as `train/loss` and `eval/top1`. Each
            metric may be missing from any of them.
        metrics: those of the task.
        path: of the PNG to write or replace.

    Raises NotWritten if it cannot be written.
    """
    panels, best = _panels(metrics), _best(lines, metrics)
    figure = new_figure(figsize=(10, 2 + 3 * (len(panels) - 1)), layout="constrained")
    from matplotlib.ticker import MaxNLocator  # late, see `new_figure`

    all_axes = figure.subplots(len(panels), sharex=True, height_ratios=(3,) * (len(panels) - 1) + (1.5,))
    for axes, (label, curves) in zip(all_axes, panels.items(), strict=True):
        for name, colour, style, meaning in curves:
            _draw_curve(axes, lines, name, colour, style, meaning)
            if best is not None and best[0] == name:
                _, step, epoch, value = best
                told = f"the best, {_short(value)}, in epoch {epoch}"
                axes.plot(step, value, "*", color=colour, ms=13, mec="white", zorder=3, label=told)
        if best is not None:
            axes.axvline(best[1], color=_NEUTRAL, linewidth=0.8, linestyle=(0, (4, 4)), alpha=0.6)
        axes.set_ylabel(label)
        axes.ticklabel_format(axis="y", scilimits=(-3, 4))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))  # beside, never in front
    all_axes[-1].set_xlabel("step")
    all_axes[-1].set_xlim(left=0)
    all_axes[-1].set_ylim(bottom=0)
    all_axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, steps=(1, 2, 5, 10)))
    # told by the last evaluation, which comes at the end of an epoch
    ends = (line for line in reversed(lines) if "eval/loss" in line and line["epoch"])
    steps_per_epoch = next((line["step"] / line["epoch"] for line in ends), None)
    if steps_per_epoch:
        to_epoch, to_step = (lambda step: step / steps_per_epoch), (lambda epoch: epoch * steps_per_epoch)
        epochs = all_axes[0].secondary_xaxis("top", functions=(to_epoch, to_step))
        epochs.set_xlabel("epoch")
        epochs.spines["top"].set_visible(False)
        epochs.xaxis.set_major_locator(MaxNLocator(integer=True, steps=(1, 2, 5, 10)))
    save_figure(figure, path)


def _draw_curve(axes: "Axes", lines: Sequence[Mapping[str, Any]], name: str, colour: str, style: str, meaning: str):
    """A curve of what the lines have by this name. Of training, a line is drawn through the means of the epochs, once
    there are two, and what they are the means of is faint; a learning rate holds until the step where it is told, the
    first one from the start."""
    points = [(line["step"], line[name]) for line in lines if name in line]
    if not points:
        return
    how = {"color": colour}
    if name == "train/lr":
        points = [(0, points[0][1]), *points]
        how |= {"drawstyle": "steps-pre", "markevery": slice(1, None)}
    means = _epoch_means(lines, name) if name.startswith("train/") and name != "train/lr" else []
    if len(means) > 1:
        axes.plot(*zip(*points, strict=True), "-", alpha=0.25, linewidth=0.8, **how)
        points, meaning = means, f"{meaning}, mean of an epoch"
    marker = "o" if len(points) <= _FEW_POINTS else None
    axes.plot(
        *zip(*points, strict=True), style, marker=marker, ms=3.5, label=f"{meaning}: {_short(points[-1][1])}", **how
    )


def _epoch_means(lines: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """The last step of each epoch and the mean over its steps. A line tells the mean since the one before it."""
    epochs: dict[int, list[tuple[int, int, float]]] = {}
    before = 0
    for line in lines:
        if name in line:
            epochs.setdefault(line["epoch"], []).append((line["step"], max(1, line["step"] - before), line[name]))
            before = line["step"]
    return [
        (told[-1][0], sum(steps * value for _, steps, value in told) / sum(steps for _, steps, _ in told))
        for told in epochs.values()
    ]


def _best(lines: Sequence[Mapping[str, Any]], metrics: "Sequence[Metric]") -> tuple[str, int, int, float] | None:
    """The best evaluation by the metric that chooses: its name in the log, step, epoch, value; None before two."""
    chosen = next((metric for metric in metrics if metric.better), None)
    if chosen is None:
        return None
    names = (f"eval/ema_{chosen.name}", f"eval/{chosen.name}")  # of equal ones the average counts, as in the run
    scored = [(name, line["step"], line["epoch"], line[name]) for line in lines for name in names if name in line]
    if len({step for _, step, _, _ in scored}) < 2:
        return None
    return (max if chosen.better == "max" else min)(scored, key=lambda evaluation: evaluation[3])


def _short(value: float) -> str:
    return f"{value:.4g}" if value == 0 or 0.001 <= abs(value) < 10_000 else f"{value:.1e}"
