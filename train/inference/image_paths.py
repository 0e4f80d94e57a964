"""The image files that a command line means by its PATHs: files, folders, and `-` for a list on standard input."""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from convert.errors import SettingsError
from crossvit_jax.preprocess import UnreadableImage
from train.data.sources import IMAGE_SUFFIXES

STDIN = "-"


@dataclass(frozen=True)
class FileSource:
    """Image files without labels, as a source of the input pipeline (see `train.data.sources`)."""

    paths: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises UnreadableImage for a file that cannot be read."""
        path = self.paths[index]
        try:
            encoded = Path(path).read_bytes()
        except OSError as error:
            raise UnreadableImage(shown(path), error.strerror or str(error)) from error
        return {"image": encoded, "label": 0, "name": shown(path)}


def image_paths(given: Sequence[str]) -> list[str]:
    """The files meant, in the order given; those of a folder sorted, from all folders below it too.

    In folders, files count as images by their suffix, and hidden ones do not; a file that is named itself is taken as
    it is. A name on standard input that does not exist is kept: it fails when it is read, as an image that went away.

    Raises SettingsError if a PATH does not exist or is no file or folder, or if there are no images at all; OSError if
    a folder cannot be read.
    """
    paths: list[str] = []
    for path in given:
        if path == STDIN:
            for line in _lines_of_stdin():
                paths += _below(line) if os.path.isdir(line) else [line]
        elif os.path.isdir(path):
            paths += _below(path)
        elif os.path.isfile(path):
            paths.append(path)
        elif os.path.lexists(path):
            raise SettingsError(f"{shown(path)} is neither a file nor a folder")
        else:
            raise SettingsError(f"there is no file or folder {shown(path)}")
    if not paths:
        raise SettingsError(f"no images in {', '.join(map(shown, given))} (looked for {' '.join(IMAGE_SUFFIXES)})")
    return paths


def shown(path: str) -> str:
    """A path as one line of text that any terminal takes: what cannot be printed is written as `\\n` or `\\udcff`."""
    escapes = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in path)
    return "".join(escapes)


def _lines_of_stdin() -> Iterator[str]:
    for line in sys.stdin.buffer:
        name = line.rstrip(b"\r\n")
        if name:
            yield os.fsdecode(name)  # in file names any bytes are allowed


def _below(folder: str) -> Iterator[str]:
    visited = set()
    for root, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        visited.add(os.path.realpath(root))
        # a link may lead back to a folder above it
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(os.path.join(root, name)) not in visited
        )
        for name in sorted(files):
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."):
                yield str(Path(root, name))


def _raise(error: OSError) -> NoReturn:
    raise error
