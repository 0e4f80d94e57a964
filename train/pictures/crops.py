"""Crops of pictures, and pictures beside those that a model takes for alike."""

from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image

from train.pictures.dense import pixels_of, save_sheet, sheet_scale

_MOST_SMALL, _NEAREST = 6, 4  # drawn in a row


def draw_crops(
    large: Float[np.ndarray, "images 2 height width 3"],
    small: Float[np.ndarray, "images crops _ _ 3"] | None,
    path: Path,
    *,
    title: str,
) -> None:
    """Draw the normalised crops of each image in a row, small ones smaller. Raises NotWritten if that cannot be
    written."""
    scale, pictures = sheet_scale(*large.shape[2:4]), []
    for row in range(len(large)):
        crops = [*large[row], *([] if small is None else small[row][:_MOST_SMALL])]
        pictures += [_enlarged(crop, scale) for crop in crops]
    save_sheet(path, pictures, columns=len(crops), title=title)


def draw_neighbours(
    images: Float[np.ndarray, "images height width 3"],
    features: Float[np.ndarray, "images dim"],
    path: Path,
    *,
    title: str,
) -> None:
    """Draw each normalised image, and behind it those of the others whose features have the largest cosines with its
    own. Raises NotWritten if that cannot be written."""
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, np.inf)  # itself first
    order = np.argsort(-cosines, axis=1, kind="stable")[:, : 1 + _NEAREST]
    scale = sheet_scale(*images.shape[1:3])
    pictures = [_enlarged(images[place], scale) for row in order for place in row]
    save_sheet(path, pictures, columns=order.shape[1], title=title)


def _enlarged(image: Float[np.ndarray, "height width 3"], scale: int) -> Image.Image:
    size = (image.shape[1] * scale, image.shape[0] * scale)
    return Image.fromarray(pixels_of(image)).resize(size, Image.Resampling.NEAREST)
