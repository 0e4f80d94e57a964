"""What is masked of images in pre-training, and what a model makes of it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from crossvit_jax.config import CrossViTConfig
from train.pictures.dense import pixels_of, save_sheet, sheet_scale

_GREY = 128  # of what is masked


def draw_masked(
    images: Float[np.ndarray, "images height width 3"],
    cells: Bool[np.ndarray, "images rows columns"],
    path: Path,
    *,
    title: str,
) -> None:
    """Draw normalised images, each beside what is left of it. Raises NotWritten if that cannot be written."""
    size = _drawn_size(images)
    pairs = zip(pixels_of(images), _without(pixels_of(images), cells), strict=True)
    pictures = [_enlarged(pixels, size) for pair in pairs for pixels in pair]
    save_sheet(path, pictures, columns=4, title=title)


def draw_reconstructions(
    images: Float[np.ndarray, "images height width 3"],
    cells: Bool[np.ndarray, "images rows columns"],
    patches: Sequence[Float[np.ndarray, "drawn _ _"]],
    masks: Sequence[Bool[np.ndarray, "images _"]],
    config: CrossViTConfig,
    path: Path,
    *,
    title: str,
) -> None:
    """Draw a row for each image: the image, what is left of it, and for each branch the image as it sees it with the
    predicted pixels in its masked patches. Raises NotWritten if that cannot be written.

    Args:
        patches: predicted by each branch, see `crossvit_jax.pretraining.masked.image_patches`; of no more images.
        masks: the masked patches of each branch.
    """
    count, size = len(patches[0]), _drawn_size(images)
    originals = pixels_of(images[:count])
    columns = [originals, _without(originals, cells[:count])]
    for branch, predicted in enumerate(patches):
        (rows, cols), side = config.grid_size[branch], config.patch_size[branch]
        drawn = predicted.astype(np.float32).reshape(count, rows, cols, side, side, 3).transpose(0, 1, 3, 2, 4, 5)
        drawn = pixels_of(drawn.reshape(count, rows * side, cols * side, 3))
        seen = np.stack([_seen(pixels, config.branch_image_size[branch], config.crop_scale) for pixels in originals])
        masked = masks[branch][:count].reshape(count, rows, cols).repeat(side, 1).repeat(side, 2)
        columns.append(np.where(masked[..., None], drawn, seen))
    pictures = [_enlarged(column[row], size) for row in range(count) for column in columns]
    save_sheet(path, pictures, columns=len(columns), title=title)


def _without(
    pixels: UInt8[np.ndarray, "images height width 3"], cells: Bool[np.ndarray, "images rows columns"]
) -> UInt8[np.ndarray, "images height width 3"]:
    height, width = (whole // parts for whole, parts in zip(pixels.shape[1:3], cells.shape[1:], strict=True))
    return np.where(cells.repeat(height, 1).repeat(width, 2)[..., None], np.uint8(_GREY), pixels)


def _seen(pixels: UInt8[np.ndarray, "height width 3"], size: tuple[int, int], crop: bool) -> np.ndarray:
    """An image as a branch sees it, for people: Pillow's resizing is not the model's."""
    if crop:
        top, left = (round((have - want) / 2) for have, want in zip(pixels.shape[:2], size, strict=True))
        return pixels[top : top + size[0], left : left + size[1]]
    return np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC))


def _drawn_size(images: np.ndarray) -> tuple[int, int]:
    scale = sheet_scale(*images.shape[1:3])
    return images.shape[2] * scale, images.shape[1] * scale


def _enlarged(pixels: UInt8[np.ndarray, "height width 3"], size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)
