"""Paths as people type them."""

from pathlib import Path

from convert.errors import ConversionError

FOLDER_PREFIX = "folder:"  # before the path of a folder of images, where other data sets have a name


def typed_path(path: str | Path) -> Path:
    """The path, with the home folder in place of `~` or `~name`.

    Raises:
        ConversionError: nobody's home folder is meant.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConversionError(f"{path}: {Path(path).parts[0]} is nobody's home folder") from None
