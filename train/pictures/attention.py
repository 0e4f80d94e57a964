"""Pictures of what the class tokens attend to: in the last stage, within their branch and across to the other, and
through all layers."""

import itertools
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from crossvit_jax import CrossViT, CrossViTConfig
from crossvit_jax.preprocess import MEAN, STD
from train.pictures.figure import drawable, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

_WIDTH, _HEIGHT, _ROW = 16.5, 7.9, 3.634  # inches of a picture with two branches, and of each more
_LONGEST_STEM = 200  # bytes; file systems end names at 255
_WIDEST_CLASS, _WIDEST_TITLE = 22, 120  # characters
_MOST_BARS = 6
# Of colours, in even shares: what a patch would get if all got the same. So a map that is flat looks flat, however
# little there is to see, and is not stretched to all colours.
_LEAST_SCALE = 4.0


def class_token_attention(
    model: CrossViT, images: Float[Array, "batch height width channels"]
) -> dict[str, list[Float[Array, "batch _"]]]:
    """What each branch's class token attends to in the last stage, mean over the heads: on itself, then each patch.

    Returns:
        Per branch, `own`: in its last self-attention, over the branch's patches; `across`: in the fusion, over the
        next branch's patches. Each (batch, 1 + patches), with sum 1.
    """
    return _of_last_stage(model, model.attention_maps(images))


def attention_of_all_layers(
    model: CrossViT, images: Float[Array, "batch height width channels"]
) -> dict[str, list[Float[Array, "batch _"]]]:
    """`class_token_attention`, and `rollout`: what reaches each branch's class token through all layers.

    Attention rollout (arXiv 2005.00928): the weights of the layers, each averaged with the residual connection, are
    multiplied, here over the tokens of all branches together, since the fusions pass from one to another. Of it are
    told the class token's own tokens: (batch, 1 + patches), whose sum is below 1, for the rest is of other branches.
    """
    maps = model.attention_maps(images)
    return _of_last_stage(model, maps) | {"rollout": _rollout(model.config, maps)}


def _of_last_stage(model: CrossViT, maps: dict[str, Array]) -> dict[str, list[Float[Array, "batch _"]]]:
    config, stage = model.config, f"blocks.{model.config.stages - 1}"
    first = ".0" if config.fusion_depths[-1] else ""  # the block that sees patches
    paths = {
        "own": [f"{stage}.blocks.{branch}.{depth - 1}.attn" for branch, depth in enumerate(config.stage_depths[-1])],
        "across": [f"{stage}.fusion.{branch}{first}.attn" for branch in range(len(config.branches))],
    }
    return {name: [maps[path][:, :, 0].mean(1) for path in some] for name, some in paths.items()}


def _rollout(config: CrossViTConfig, maps: dict[str, Array]) -> list[Float[Array, "batch _"]]:
    tokens = [1 + rows * columns for rows, columns in config.grid_size]
    ends = list(itertools.accumulate(tokens))
    spans = [slice(end - count, end) for end, count in zip(ends, tokens, strict=True)]
    first = next(iter(maps.values()))
    # `mixed[b][:, t]`: of which inputs, of all branches, branch b's token t is made
    inputs = jnp.broadcast_to(jnp.eye(ends[-1], dtype=first.dtype), (len(first), ends[-1], ends[-1]))
    mixed = [inputs[:, span] for span in spans]
    for stage, depths in enumerate(config.stage_depths):
        for branch, depth in enumerate(depths):
            for block in range(depth):
                weights = maps[f"blocks.{stage}.blocks.{branch}.{block}.attn"].mean(1)
                mixed[branch] = (mixed[branch] + weights @ mixed[branch]) / 2
        block = ".0" if config.fusion_depths[stage] else ""  # those after it see the class token alone
        fused = []
        for branch, own in enumerate(mixed):
            others = mixed[(branch + 1) % len(mixed)]
            seen = jnp.concatenate([own[:, :1], others[:, 1:]], axis=1)
            weights = maps[f"blocks.{stage}.fusion.{branch}{block}.attn"].mean(1)
            fused.append(jnp.concatenate([(own[:, :1] + weights @ seen) / 2, own[:, 1:]], axis=1))
        mixed = fused
    return [of_branch[:, 0, span] for of_branch, span in zip(mixed, spans, strict=True)]


def picture_paths(folder: Path, images: Sequence[str]) -> list[Path]:
    """A file in the folder for the picture of each image, no two the same.

    The folders below the one that all images have in common are there again. A picture has the image's own stem, with a
    number where another image there has it already.
    """
    parents = [os.path.dirname(os.path.abspath(image)) for image in images]
    common = os.path.commonpath(parents) if parents else ""
    below = [Path(os.path.relpath(parent, common)) for parent in parents]
    taken = {_alike(str(some)) for places in set(below) for some in (places, *places.parents)}
    paths = []
    for image, place in zip(images, below, strict=True):
        stem = os.fsdecode(os.fsencode(Path(image).stem)[:_LONGEST_STEM])
        path, number = place / f"{stem}.png", 1
        while (same := _alike(str(path))) in taken:
            number += 1
            path = place / f"{stem}-{number}.png"
        taken.add(same)
        paths.append(folder / path)
    return paths


def _alike(name: str) -> str:
    """The same for names that some file systems do not tell apart: by case, or by how accents are put together."""
    return unicodedata.normalize("NFC", name.casefold())


def draw_attention(
    path: Path,
    config: CrossViTConfig,
    *,
    title: str,
    image: Float[np.ndarray, "height width channels"],
    attention: dict[str, list[Float[np.ndarray, " _"]]],
    predictions: Sequence[tuple[str, float]],
) -> None:
    """Draw an image as the model saw it, its predictions, and three maps for each branch.

    Args:
        path: of the PNG to write or replace.
        title: what the image is called; the best prediction is told beside it.
        image: normalised, as it was given to the model.
        attention: of this image, see `attention_of_all_layers`.
        predictions: names of classes and their probabilities, the best first.

    Raises NotWritten if it cannot be written.
    """
    pixels = np.clip(image * STD + MEAN, 0, 1)
    height, width = config.image_size
    branches = len(config.branches)
    figure = new_figure(figsize=(_WIDTH, _HEIGHT + _ROW * max(0, branches - 2)))
    share = _HEIGHT / figure.get_figheight()

    def place(left, bottom, width, height):
        """Shares of a picture with two branches, to be kept at its top."""
        return left, 1 - (1 - bottom) * share, width, height * share

    best, probability = predictions[0]
    heading = drawable(f"{title}: {best}, {100 * probability:.1f} %", _WIDEST_TITLE)
    figure.text(0.015, 1 - 0.045 * share, heading, fontsize=12, parse_math=False)
    # placed by hand: to let matplotlib find the places takes longer than to draw
    crop_axes = figure.add_axes(place(0.015, 0.44, 0.22, 0.45))
    crop_axes.imshow(pixels)
    crop_axes.set_axis_off()
    crop_axes.set_title(f"what the model saw: {height} x {width} pixels", fontsize=10)
    _draw_predictions(figure.add_axes(place(0.12, 0.06, 0.11, 0.3)), predictions[:_MOST_BARS])

    for branch in range(branches):
        across = (branch + 1) % branches
        columns = (("own", branch, "self-attention"), ("across", across, "fusion"), ("rollout", branch, "all layers"))
        for column, (kind, seen, where) in enumerate(columns):
            axes = figure.add_axes(place(0.255 + 0.25 * column, 0.53 - 0.46 * branch, 0.21, 0.36))
            values = attention[kind][branch]
            rows, cols = config.grid_size[seen]
            shown = _draw_map(axes, pixels, values[1:].reshape(rows, cols), region=seen_region(config, seen))
            whose = f"branch {seen}'s" if kind == "across" else "its own"
            axes.set_title(
                f"class token of branch {branch} over\n"
                f"{whose} {rows} x {cols} patches of {config.patch_size[seen]} px ({where})",
                fontsize=9.5,
            )
            rest = f", other branches {100 * (1 - values.sum()):.1f} %" if kind == "rollout" else ""
            caption = f"brightest patch {100 * values[1:].max():.1f} %, the token itself {100 * values[0]:.1f} %{rest}"
            axes.text(
                0.5, -0.025, caption, transform=axes.transAxes, ha="center", va="top", fontsize=8.5, color="#555555"
            )
            bar_axes = figure.add_axes(place(0.46 + 0.25 * column, 0.53 - 0.46 * branch, 0.006, 0.36))
            bar = figure.colorbar(shown, cax=bar_axes)
            bar.ax.tick_params(labelsize=8)
            bar.set_label("times an even share", fontsize=8)
    save_figure(figure, path)


def _draw_predictions(axes: "Axes", predictions: Sequence[tuple[str, float]]) -> None:
    shares = [probability for _, probability in predictions]
    names = [drawable(name, _WIDEST_CLASS) for name, _ in predictions]
    axes.barh(range(len(shares)), shares, color="#4c72b0", height=0.7)
    axes.set_yticks(range(len(names)), names, fontsize=9, parse_math=False)
    for row, value in enumerate(shares):
        axes.text(value + 0.02, row, f"{100 * value:.1f} %", va="center", fontsize=9)
    axes.set_xlim(0, 1.25)
    axes.set_ylim(_MOST_BARS - 0.5, -0.5)  # the best on top, and few bars as thick as many
    axes.set_xticks([])
    axes.set_title("predictions", fontsize=10)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _draw_map(
    axes: "Axes",
    pixels: Float[np.ndarray, "height width channels"],
    values: Float[np.ndarray, "rows columns"],
    *,
    region: tuple[float, float, float, float],
) -> "AxesImage":
    """The picture in grey, and over it each patch in the colour of its share, as a multiple of an even share."""
    axes.imshow(pixels @ (0.299, 0.587, 0.114), cmap="gray", vmin=0, vmax=1)
    limits = {"xlim": axes.get_xlim(), "ylim": axes.get_ylim()}
    times_even = values / max(values.mean(), np.finfo(np.float32).tiny)
    scale = {"vmin": 0, "vmax": max(_LEAST_SCALE, times_even.max())}
    shown = axes.imshow(times_even, cmap="inferno", extent=region, interpolation="nearest", alpha=0.6, **scale)
    axes.set(**limits)  # a branch may see only the middle
    axes.set_axis_off()
    return shown


def seen_region(config: CrossViTConfig, branch: int) -> tuple[float, float, float, float]:
    """The part of the image that a branch sees: all of it, or its middle.

    Returns:
        (left, right, bottom, top) in pixels, whose centres are whole numbers.
    """
    height, width = config.image_size
    seen_height, seen_width = config.branch_image_size[branch] if config.crop_scale else (height, width)
    top, left = round((height - seen_height) / 2) - 0.5, round((width - seen_width) / 2) - 0.5
    return left, left + seen_width, top + seen_height, top
