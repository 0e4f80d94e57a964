"""Precision over recall as a picture."""

from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Float
from numpy import ndarray

from train.pictures.figure import drawable, new_figure, save_figure

_MOST_NAMED = 20  # classes with a line of their own in the legend, the best ones first
_LONGEST_NAME, _LONGEST_TITLE = 24, 90  # characters

Curve = tuple[Float[ndarray, " points"], Float[ndarray, " points"]]  # recall and precision


def draw_precision_recall(
    curves: Sequence[Curve | None], class_names: Sequence[str], path: Path, *, title: str
) -> None:
    """Draw the precision that is reached at each recall: a line for each class, and their mean.

    Args:
        curves: of each class; None for one without objects.
        path: of the PNG to write or replace.

    Raises NotWritten if it cannot be written.
    """
    told = [(curve, name) for curve, name in zip(curves, class_names, strict=True) if curve is not None]
    told.sort(key=lambda pair: -pair[0][1].mean())
    figure = new_figure(figsize=(9, 5.6), layout="constrained")
    from matplotlib import colormaps  # late, see `new_figure`

    axes = figure.subplots()
    colours = colormaps["tab20"].colors if len(told) > 10 else colormaps["tab10"].colors
    for place, ((recall, precision), name) in enumerate(told):
        named = place < _MOST_NAMED
        label = f"{drawable(name, _LONGEST_NAME)}  {precision.mean():.3f}" if named else None
        colour = colours[place % len(colours)] if named else "#cccccc"
        axes.plot(recall, precision, color=colour, linewidth=1.3, label=label, zorder=2 if named else 1)
    if len(told) > 1:
        mean = sum(precision for (_, precision), _ in told) / len(told)
        axes.plot(told[0][0][0], mean, color="black", linewidth=2.4, label=f"mean  {mean.mean():.3f}", zorder=3)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    axes.grid(color="#e5e5e5")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(drawable(title, _LONGEST_TITLE), parse_math=False)
    if told:
        box = figure.legend(loc="outside right upper", frameon=False, fontsize=9, title="AP50")
        for text in box.get_texts():
            text.set_parse_math(False)
    save_figure(figure, path)
