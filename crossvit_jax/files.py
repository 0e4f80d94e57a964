"""Files that may come from anybody: only regular ones are read."""

import json
import os
import stat
from typing import Any, BinaryIO

# of an image, unless `crossvit_jax.preprocess.limit_pixels` says otherwise: as many as Pillow would read
MAX_PIXELS = 178_956_970
_LARGEST_JSON = 2**28  # bytes
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


class NotRegular(OSError):
    """What is no regular file: to read it might wait for ever, or never end."""


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """A regular file, or one that a link leads to, opened to be read.

    Raises:
        NotRegular: it is a folder, a named pipe, a device or a socket; nothing of it is read.
        OSError: as `open` does, also for a name that no file can have.
    """
    _check(os.stat(_possible(path)).st_mode, path)  # first: to open a device may do something
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    try:
        check_open(descriptor, path)  # it may have been replaced meanwhile
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: str | os.PathLike, *, at_most: int | None = None) -> bytes:
    """What is in a regular file.

    Args:
        at_most: bytes; a longer file is not read.

    Raises:
        OSError: as `open_regular` does, or the file is longer.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if at_most is not None and size > at_most:
            raise OSError(27, f"it has {size:,} bytes; read are {at_most:,} at most", os.fspath(path))
        return file.read() if at_most is None else file.read(at_most)


def read_json(path: str | os.PathLike, *, empty: Any = None) -> Any:
    """The content of a JSON file that may be damaged, or anything else.

    Args:
        empty: what a file of no bytes stands for; None: it is no JSON.

    Raises:
        ValueError: it is no JSON.
        OSError: as `read_regular` does.
    """
    try:
        content = read_regular(path, at_most=_LARGEST_JSON)
        return json.loads(content) if content or empty is None else empty
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None


def check_regular(folder: str | os.PathLike, *, levels: int = 8) -> None:
    """Whether all that lies below a folder is regular files and folders, for those who give a folder to a library.

    Links to folders are followed, so many levels deep, and each folder is looked at once.

    Raises:
        NotRegular: something is neither.
        OSError: a folder cannot be read, or a link leads nowhere.
    """
    folders, seen = [(os.fspath(folder), 0)], set()
    while folders:
        path, level = folders.pop()
        found = os.stat(path)
        if stat.S_ISDIR(found.st_mode) and level <= levels:
            if (found.st_dev, found.st_ino) not in seen:
                seen.add((found.st_dev, found.st_ino))
                folders += [(os.path.join(path, name), level + 1) for name in os.listdir(path)]
        else:
            _check(found.st_mode, path)


def check_open(descriptor: int, path: str | os.PathLike) -> None:
    """Raises NotRegular if what was opened is no regular file. `path` is told."""
    _check(os.fstat(descriptor).st_mode, path)


def _check(mode: int, path: str | os.PathLike) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise NotRegular(21, f"it is {kind}, not a regular file", os.fspath(path))


def _possible(path: str | os.PathLike) -> str:
    """Raises FileNotFoundError for a name that no file can have, of which Python raises ValueError."""
    if "\0" in os.fspath(path):
        raise FileNotFoundError(2, "it is no path: embedded null byte", os.fspath(path).replace("\0", "\\0"))
    return os.fspath(path)
