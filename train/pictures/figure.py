"""What all pictures share. They are drawn without a display and without pyplot.

matplotlib is imported when something is drawn: it takes half a second, and most of the time nothing is.
"""

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from convert.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI = 120


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG, whole or not at all. Raises NotWritten if that is impossible."""
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
