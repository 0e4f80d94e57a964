"""Paths as people type them."""

import errno
import os
from pathlib import Path

from convert.errors import ConversionError

FOLDER_PREFIX = "folder:"  # before the path of a folder of images, where other data sets have a name


def typed_path(path: str | Path) -> Path:
    """The path, with the home folder in place of `~` or `~name`.

    Raises:
        ConversionError: nobody's home folder is meant, or a name is too long for a file.
    """
    try:
        path = Path(path).expanduser()
        os.lstat(path)
    except RuntimeError:
        raise ConversionError(f"{path}: {Path(path).parts[0]} is nobody's home folder") from None
    except OSError as error:  # that nothing is there, or cannot be read, matters to some only
        if error.errno == errno.ENAMETOOLONG:  # here, since Path.is_file and the like raise that
            raise ConversionError(f"{path}: {error.strerror}") from None
    return path
