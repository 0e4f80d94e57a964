"""A confusion matrix as a picture."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from train.pictures.figure import drawable, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

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

    Raises NotWritten if it cannot be written.
    """
    draw = _draw_small if len(confusion) <= _MOST_NUMBERED else _draw_large
    image = draw(confusion, [drawable(name, _LONGEST_NAME) for name in class_names])
    from matplotlib.ticker import PercentFormatter  # late, see `new_figure`

    axes, figure = image.axes, image.figure
    axes.set_title(drawable(title, _LONGEST_TITLE), parse_math=False)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    bar = figure.colorbar(image, ax=axes, shrink=0.8, format=PercentFormatter(1, decimals=None))
    bar.set_label("share of the true class")
    save_figure(figure, path)


def _draw_small(confusion: Int[np.ndarray, "classes classes"], class_names: Sequence[str]) -> "AxesImage":
    classes = len(confusion)
    side = 3.2 + 0.42 * classes
    figure = new_figure(figsize=(side + 0.9, side), layout="constrained")
    axes = figure.subplots()
    shares = _shares(confusion)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.argwhere(confusion):
        colour = "white" if shares[row, column] > 0.5 else "black"
        count = f"{confusion[row, column]}"
        size = 9 if len(count) < 4 else 7
        axes.text(column, row, count, color=colour, fontsize=size, ha="center", va="center")
    _name_axes(axes, class_names, font_size=9)
    return image


def _draw_large(confusion: Int[np.ndarray, "classes classes"], class_names: Sequence[str]) -> "AxesImage":
    classes = len(confusion)
    shares = _by_blocks(_shares(confusion))
    figure = new_figure(figsize=(17, 10.5), layout="constrained")
    from matplotlib.colors import LogNorm  # late, see `new_figure`

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
    _list_pairs(list_axes, confusion, class_names)
    return image


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
