"""The files in which boxes and classes are written: read whole, as nobody may have written them with care."""

from pathlib import Path

from convert.errors import SettingsError
from crossvit_jax.files import read_regular

_LARGEST = 2**32  # bytes; the annotations of COCO's 118,287 training pictures have 2^29


def read_annotations(file: Path, *, at_most: int = _LARGEST) -> bytes:
    """What is in a regular file. Raises SettingsError, naming it, for anything else and for more than so many bytes."""
    try:
        return read_regular(file, at_most=at_most)
    except OSError as error:
        raise SettingsError(f"cannot read {file}: {error.strerror}") from None


def read_lines(file: Path) -> list[str]:
    """Its lines of UTF-8 text, without what is blank around them. Raises SettingsError as above, and for other text."""
    try:
        text = read_annotations(file).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise SettingsError(f"cannot read {file}: it is no UTF-8 text") from None
    return [line.strip() for line in text.splitlines()]
