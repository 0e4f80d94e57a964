"""Images as a model gets them, in a sheet."""

from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Float
from numpy import ndarray
from PIL import Image

from train.pictures.dense import pixels_of, save_sheet, sheet_scale

SHEET_COLUMNS = 4


def draw_sheet(
    images: Float[ndarray, "images height width 3"], captions: Sequence[str], path: Path, *, title: str
) -> None:
    """Draw normalised images, each with its caption. Raises NotWritten if that cannot be written."""
    scale = sheet_scale(*images.shape[1:3])
    size = (images.shape[2] * scale, images.shape[1] * scale)
    drawn = [Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST) for pixels in pixels_of(images)]
    save_sheet(path, drawn, columns=SHEET_COLUMNS, title=title, captions=captions)
