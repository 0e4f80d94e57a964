"""What is seen in a picture."""

from pathlib import Path

import numpy as np
from PIL import Image


def pixels_of(path: Path) -> np.ndarray:
    """The pixels of a PNG file (height, width, 3), as integers that can be subtracted."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)
