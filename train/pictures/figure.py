"""What all pictures share. They are drawn without a display and without pyplot.

matplotlib is imported when something is drawn: it takes half a second, and most of the time nothing is.
"""

import contextlib
import io
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from convert.errors import require
from convert.files import write_whole
from crossvit_jax.files import open_regular

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI = 120
SOFTWARE = "crossvit-jax"  # in the metadata of every picture


def new_figure(**settings: Any) -> "Figure":
    """matplotlib's `Figure` with these settings, whatever backend the environment names.

    Raises MissingExtra where matplotlib is not installed.
    """
    require("drawing", "matplotlib")
    if "matplotlib" not in sys.modules:
        _import_matplotlib()
    from matplotlib.figure import Figure

    return Figure(**settings)


def _import_matplotlib() -> None:
    """A notebook's MPLBACKEND is inherited by what is started from it, and may name a package that is not installed
    here: the import fails then. Nothing here needs a backend, but the rest of the program may."""
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend:
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = backend


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG, whole or not at all. Raises NotWritten if that is impossible."""
    png = io.BytesIO()
    with warnings.catch_warnings():
        # a name in a script that the font lacks is drawn as boxes; the files beside the picture have it in full
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        metadata, compression = {"Software": SOFTWARE}, {"compress_level": 3}
        figure.savefig(png, format="png", backend="agg", dpi=_DPI, metadata=metadata, pil_kwargs=compression)
    write_whole(path, png.getvalue())


def is_own_picture(path: Path) -> bool:
    """Whether a file was written by `save_figure`."""
    try:
        with open_regular(path) as file, Image.open(file, formats=["PNG"]) as image:
            return image.info.get("Software") == SOFTWARE
    except Exception:  # whatever Pillow's parsers raise
        return False


def drawable(text: str, longest: int) -> str:
    """Text that fonts take, in so many characters: what cannot be printed is replaced, what is too long is cut off."""
    text = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
