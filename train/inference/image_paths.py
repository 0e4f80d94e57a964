"""The image files that a command line means by its PATHs: files, folders, and `-` for a list on standard input."""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.errors import SettingsError
from convert.files import shown
from convert.image_files import IMAGE_SUFFIXES, LeftOut, image_files
from crossvit_jax.preprocess import UnreadableImage

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


def image_paths(given: Sequence[str], left_out: LeftOut) -> list[str]:
    """The files meant, in the order given; those of a folder sorted, from all folders below it too.

    Folders are searched by `convert.image_files`; a file that is named itself is taken as it is. A name on standard
    input that does not exist is kept: it fails when it is read, as an image that went away.

    Args:
        left_out: is told what is passed over in folders.

    Raises SettingsError if a PATH does not exist or is no file or folder, or if there are no images at all; OSError if
    a folder cannot be read.
    """
    paths: list[str] = []
    for path in given:
        if path == STDIN:
            for line in _lines_of_stdin():
                paths += image_files(line, left_out=left_out) if os.path.isdir(line) else [line]
        elif os.path.isdir(path):
            paths += image_files(path, left_out=left_out)
        elif os.path.isfile(path):
            paths.append(path)
        elif os.path.lexists(path):
            raise SettingsError(f"{shown(path)} is neither a file nor a folder")
        else:
            raise SettingsError(f"there is no file or folder {shown(path)}")
    if not paths:
        raise SettingsError(f"no images in {', '.join(map(shown, given))} (looked for {' '.join(IMAGE_SUFFIXES)})")
    return paths


def _lines_of_stdin() -> Iterator[str]:
    for line in sys.stdin.buffer:
        name = line.rstrip(b"\r\n")
        if name:
            yield os.fsdecode(name)  # in file names any bytes are allowed
