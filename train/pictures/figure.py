"""Pictures of results: the curves of a run, and a confusion matrix. Drawn without a display and without pyplot."""

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from train.run.whole_file import write_whole

# matplotlib is imported when something is drawn: it takes half a second, and most of the time nothing is
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TRAINING, _HELD_OUT, _AVERAGED, _NEUTRAL = "#4c72b0", "#dd8452", "#55a868", "#555555"
_FEW_POINTS = 40  # so many or fewer are marked one by one
_DPI = 120


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG, whole or not at all. Raises OSError if that is impossible."""
    png = io.BytesIO()
    with warnings.catch_warnings():
        # a name in a script that the font lacks is drawn as boxes; the files beside the picture have it in full
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(png, format="png", dpi=_DPI, pil_kwargs={"compress_level": 3})
    write_whole(path, png.getvalue())


def drawable(text: str, longest: int) -> str:
    """Text that fonts take, in so many characters: what cannot be printed is replaced, what is too long is cut off."""
    text = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


# --- the curves of a run ---

# per panel: its label, and per curve the metric's name, colour, line style and meaning
_PANELS = (
    (
        "loss",
        (
            ("train/loss", _TRAINING, "-", "training"),
            ("eval/loss", _HELD_OUT, "-", "held out"),
            ("eval/ema_loss", _AVERAGED, "-", "held out, averaged weights"),
        ),
    ),
    (
        "accuracy in percent",
        (
            ("train/top1", _TRAINING, "-", "training top-1"),
            ("eval/top1", _HELD_OUT, "-", "held-out top-1"),
            ("eval/ema_top1", _AVERAGED, "-", "the same, averaged weights"),
            ("eval/top5", _HELD_OUT, ":", "held-out top-5"),
            ("eval/ema_top5", _AVERAGED, ":", "the same, averaged weights"),
        ),
    ),
    ("learning rate", (("train/lr", _NEUTRAL, "-", "learning rate"),)),
)


def draw_curves(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw loss, accuracy and learning rate over the steps of a run, as far as it has come.

    Args:
        lines: those of `metrics.jsonl`: `step`, `epoch` and metrics by name, such as `train/loss` and `eval/top1`. Each
            metric may be missing from any of them.
        path: of the PNG to write or replace.

    Raises OSError if it cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 8), layout="constrained")
    all_axes = figure.subplots(len(_PANELS), sharex=True, height_ratios=(3, 3, 1.5))
    for axes, (label, curves) in zip(all_axes, _PANELS, strict=True):
        for name, colour, style, meaning in curves:
            points = [(line["step"], line[name]) for line in lines if name in line]
            if points:
                marker = "o" if len(points) <= _FEW_POINTS else None
                label_with_last = f"{meaning}: {_short(points[-1][1])}"
                axes.plot(*zip(*points, strict=True), style, color=colour, marker=marker, ms=3.5, label=label_with_last)
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
    steps_per_epoch = _steps_per_epoch(lines)
    if steps_per_epoch:
        to_epoch, to_step = (lambda step: step / steps_per_epoch), (lambda epoch: epoch * steps_per_epoch)
        epochs = all_axes[0].secondary_xaxis("top", functions=(to_epoch, to_step))
        epochs.set_xlabel("epoch")
        epochs.spines["top"].set_visible(False)
        epochs.xaxis.set_major_locator(MaxNLocator(integer=True, steps=(1, 2, 5, 10)))
    save_figure(figure, path)


def _steps_per_epoch(lines: Sequence[Mapping[str, Any]]) -> float | None:
    """Told by the last evaluation, which comes at the end of an epoch; None before the first."""
    return next((line["step"] / line["epoch"] for line in reversed(lines) if "eval/loss" in line), None)


def _short(value: float) -> str:
    return f"{value:.4g}" if 0.001 <= abs(value) < 10_000 else f"{value:.1e}"


# --- the confusion matrix ---

_MOST_NUMBERED = 25  # classes whose counts are written into the cells
_MOST_NAMED = 80  # classes whose names fit beside the axes
_LONGEST_NAME, _LONGEST_TITLE = 24, 80  # characters
_MOST_CELLS = 1000  # along a side; more classes share them
_PAIRS = 24  # most frequent confusions, listed where the cells have no numbers


def draw_confusion(
    confusion: Int[np.ndarray, "classes classes"], class_names: Sequence[str], path: Path, *, title: str
) -> None:
    """Draw how often images of each class (row) were predicted as each class (column), as shares of the row.

    Few classes are named, and their images counted in the cells; many are numbered, and the most frequent confusions
    are listed beside the matrix.

    Args:
        path: of the PNG to write or replace.

    Raises OSError if it cannot be written.
    """
    draw = _draw_small if len(confusion) <= _MOST_NUMBERED else _draw_large
    figure = draw(confusion, [drawable(name, _LONGEST_NAME) for name in class_names])
    figure.axes[0].set_title(drawable(title, _LONGEST_TITLE), parse_math=False)
    save_figure(figure, path)


def _draw_small(confusion: Int[np.ndarray, "classes classes"], class_names: Sequence[str]) -> "Figure":
    from matplotlib.figure import Figure

    classes = len(confusion)
    side = 3.2 + 0.42 * classes
    figure = Figure(figsize=(side + 0.9, side), layout="constrained")
    axes = figure.subplots()
    shares = _shares(confusion)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.argwhere(confusion):
        colour = "white" if shares[row, column] > 0.5 else "black"
        count = f"{confusion[row, column]}"
        size = 9 if len(count) < 4 else 7
        axes.text(column, row, count, color=colour, fontsize=size, ha="center", va="center")
    _name_axes(axes, class_names, font_size=9)
    _label_axes(axes)
    _add_colour_bar(figure, image, axes)
    return figure


def _draw_large(confusion: Int[np.ndarray, "classes classes"], class_names: Sequence[str]) -> "Figure":
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    classes = len(confusion)
    shares = _by_blocks(_shares(confusion))
    figure = Figure(figsize=(17, 10.5), layout="constrained")
    axes, list_axes = figure.subplots(1, 2, width_ratios=(11, 5))
    # on a linear scale, single confusions would not be seen
    smallest = shares[shares > 0].min(initial=1) / 10  # itself not too pale
    image = axes.imshow(
        np.ma.masked_equal(shares, 0),
        cmap="viridis_r",
        norm=LogNorm(smallest, 1),
        extent=(-0.5, classes - 0.5, classes - 0.5, -0.5),
        interpolation="nearest",
    )
    if classes <= _MOST_NAMED:
        _name_axes(axes, class_names, font_size=min(9, 500 / classes))
    _label_axes(axes)
    _add_colour_bar(figure, image, axes)
    _list_pairs(list_axes, confusion, class_names)
    return figure


def _shares(confusion: Int[np.ndarray, "classes classes"]) -> Float[np.ndarray, "classes classes"]:
    """Each row divided by its sum; a class without images is all 0."""
    return confusion / np.maximum(confusion.sum(1, keepdims=True), 1)


def _by_blocks(shares: Float[np.ndarray, "classes classes"]) -> Float[np.ndarray, "cells cells"]:
    """The largest share in each block of classes, so that no single confusion is lost between the pixels."""
    size = -(-len(shares) // _MOST_CELLS)
    padding = -len(shares) % size
    blocks = np.pad(shares, (0, padding)).reshape(-(-len(shares) // size), size, -1, size)
    return blocks.max((1, 3))


def _name_axes(axes: "Axes", class_names: Sequence[str], *, font_size: float) -> None:
    rotation = 90 if max(map(len, class_names)) > 2 else 0
    axes.set_xticks(range(len(class_names)), class_names, rotation=rotation, fontsize=font_size, parse_math=False)
    axes.set_yticks(range(len(class_names)), class_names, fontsize=font_size, parse_math=False)


def _label_axes(axes: "Axes") -> None:
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")


def _add_colour_bar(figure: "Figure", image: Any, axes: "Axes") -> None:
    from matplotlib.ticker import PercentFormatter

    bar = figure.colorbar(image, ax=axes, shrink=0.8, format=PercentFormatter(1, decimals=None))
    bar.set_label("share of the true class")


def _list_pairs(axes: "Axes", confusion: Int[np.ndarray, "classes classes"], class_names: Sequence[str]) -> None:
    axes.set_axis_off()
    rows = [
        f"{count:5} of {total:<6} {class_names[true]} → {class_names[predicted]}"
        for count, total, true, predicted in _most_confused(confusion)
    ]
    text = "\n\n".join(["Most frequent confusions (true → predicted)", *rows])
    axes.text(0, 0.98, text, va="top", fontsize=10, transform=axes.transAxes, parse_math=False)


def _most_confused(confusion: Int[np.ndarray, "classes classes"]) -> Iterator[tuple[int, int, int, int]]:
    """(images, images of the true class, true class, predicted class) of the most frequent confusions."""
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    rows, columns = np.nonzero(wrong)
    order = np.argsort(-wrong[rows, columns], kind="stable")[:_PAIRS]
    for true, predicted in zip(rows[order], columns[order], strict=True):
        yield wrong[true, predicted], confusion[true].sum(), true, predicted
