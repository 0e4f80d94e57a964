"""The image files below a folder: the one search of training, prediction and calibration."""

import os
import stat
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from convert.errors import listed
from convert.files import shown

# The suffix decides which files count, since a million of them would have to be opened otherwise, and half a download
# or a raw photograph begins like an image too. How a file is decoded is decided by its content alone.
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
}
IMAGE_SUFFIXES = tuple(sorted(suffix for suffixes in FORMATS.values() for suffix in suffixes))
_OF_SYSTEMS = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found"}  # folders that nobody made by hand
_LONGEST_SUFFIX = 12  # characters; what is behind the last dot of a sentence is none


USUAL_SHARE = 0.01  # of unreadable images that nobody has to accept by a flag
_FEW = 3


def accepted_unreadable(share: float, images: int) -> float:
    """How many of so many images may be unreadable: that share, but of a small data set, where a single one is a large
    share, 3, or a tenth; 0 where the share is."""
    return max(share * images, min(_FEW, images / 10)) if share else 0


@dataclass
class LeftOut:
    """What searches for image files have passed over, to be told."""

    suffixes: Counter[str] = field(default_factory=Counter)  # how many files that are no images have each
    links: list[str] = field(default_factory=list)  # those to folders that are not followed
    unreadable: list[str] = field(default_factory=list)  # images, where those who read them say so
    no_files: list[str] = field(default_factory=list)  # named pipes, devices and sockets, which look like images

    def notes(self) -> list[str]:
        """A line for each kind of what was passed over, where there is any."""
        notes = []
        if self.suffixes:
            counts = sorted(self.suffixes.items(), key=lambda item: (-item[1], item[0]))
            kinds = listed(f"{count} {shown(suffix) or 'without suffix'}" for suffix, count in counts)
            notes.append(f"left out, as their suffix is none of an image: {kinds}")
        if self.links:
            names = listed(map(shown, self.links))
            notes.append(f"links are not followed to folders above, beside or seen already: {names}")
        if self.no_files:
            notes.append(f"left out, as they are no regular files: {listed(map(shown, self.no_files))}")
        if self.unreadable:
            notes.append(f"left out, as they cannot be read: {listed(map(shown, self.unreadable))}")
        return notes


class _Folder(NamedTuple):
    path: str  # as it was come to
    real: str
    links_in: tuple[str, ...]  # the real folders that hold the links on the way


class _File(NamedTuple):
    folder: list[str]  # the names on the way to it: a folder is sorted before those in it
    name: str
    path: str
    id: tuple[int, int] | None  # of the file itself, behind a link; None: there is nothing behind it
    is_link: bool


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is left out without a word."""
    return name.startswith(".") or name in _OF_SYSTEMS


def is_image(name: str) -> bool:
    """Whether a file of this name counts as an image: by its suffix, in any case."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def is_within(path: str, folder: str) -> bool:
    """Whether a real path is that of a folder or lies below it."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def image_files(
    folder: str | os.PathLike, *, apart: Collection[str] = frozenset(), left_out: LeftOut | None = None
) -> list[str]:
    """The paths of the image files in a folder, sorted, then those of the folders in it, in the same way.

    Hidden files and folders are left out. Links are followed, but for those to a folder above; each folder, and each
    file that links lead to, is there once.

    Args:
        apart: real paths of folders whose images belong elsewhere, as those of other classes do. No link into one of
            them, or to a folder above one, is followed.
        left_out: is told what is passed over.

    Raises:
        OSError: a folder cannot be read.
    """
    left_out = LeftOut() if left_out is None else left_out
    start = os.path.realpath(folder)
    files: list[_File] = []
    seen: set[str] = set()
    waiting = _search(_Folder(str(Path(folder)), start, ()), apart, seen, files, left_out)
    while waiting:  # links, when all folders that need none have been seen
        found = []
        for link in sorted(waiting):
            if link.real in seen or _leads_away(link, start, apart):
                left_out.links.append(link.path)
            else:
                found += _search(link, apart, seen, files, left_out)
        waiting = found
    files = _once(files) if any(file.is_link for file in files) else files
    files.sort(key=lambda file: file[:2])
    return [file.path for file in files]


def _search(
    start: _Folder, apart: Collection[str], seen: set[str], files: list[_File], left_out: LeftOut
) -> list[_Folder]:
    """Adds the image files below a folder; the links to folders that lie there are returned."""
    links, folders = [], [start]
    while folders:
        folder = folders.pop()
        if folder.real in seen or (folder.real in apart and folder is not start):
            continue
        seen.add(folder.real)
        names, device = folder.path.split(os.sep), os.stat(folder.path).st_dev
        with os.scandir(folder.path) as entries:
            for entry in entries:
                if is_hidden(entry.name):
                    continue
                if entry.is_symlink():
                    if _is_folder(entry):
                        links.append(_Folder(entry.path, os.path.realpath(entry.path), (*folder.links_in, folder.real)))
                        continue
                    found = _linked_file(names, entry)
                elif entry.is_dir():
                    folders.append(_Folder(entry.path, os.path.join(folder.real, entry.name), folder.links_in))
                    continue
                else:
                    is_file = entry.is_file()  # and no pipe, which would be waited for
                    found = _File(names, entry.name, entry.path, (device, entry.inode()), False) if is_file else None
                if found is not None and is_image(entry.name):
                    files.append(found)
                elif found is None:
                    left_out.no_files.append(entry.path)
                else:
                    left_out.suffixes[_suffix(entry.name)] += 1
    return links


def _is_folder(link: os.DirEntry) -> bool:
    try:
        return link.is_dir()
    except OSError:  # it leads to itself
        return False


def _linked_file(folder: list[str], link: os.DirEntry) -> _File | None:
    """None for a link to what is no file. One that leads nowhere is kept: whoever reads it is told."""
    try:
        status = link.stat()
    except OSError:
        return _File(folder, link.name, link.path, None, True)
    is_file = stat.S_ISREG(status.st_mode)
    return _File(folder, link.name, link.path, (status.st_dev, status.st_ino), True) if is_file else None


def _leads_away(link: _Folder, start: str, apart: Collection[str]) -> bool:
    if any(is_within(place, link.real) for place in link.links_in):
        return True
    others = (other for other in apart if other != start)
    return any(is_within(link.real, other) or is_within(other, link.real) for other in others)


def _once(files: Iterable[_File]) -> list[_File]:
    """Without the links to files that are there themselves, or by an earlier link."""
    kept, ids = [], set()
    for file in sorted(files, key=lambda file: (file.is_link, file[:2])):
        if not (file.is_link and file.id in ids):
            kept.append(file)
        if file.id is not None:
            ids.add(file.id)
    return kept


def _suffix(name: str) -> str:
    suffix = os.path.splitext(name)[1].lower()
    return suffix if len(suffix) <= _LONGEST_SUFFIX else ""
