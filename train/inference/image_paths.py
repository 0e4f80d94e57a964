"""The image files that a command line means by its PATHs: files, folders, and `-` for a list on standard input."""

import codecs
import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from convert.errors import SettingsError
from convert.files import shown
from convert.image_files import IMAGE_SUFFIXES, LeftOut, image_files
from crossvit_jax.preprocess import UnreadableImage, read_image_file

STDIN = "-"
_LONGEST_LIST = 2**28  # bytes: some million paths


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
            encoded = read_image_file(path)
        except OSError as error:
            raise UnreadableImage(shown(path), error.strerror or str(error)) from error
        except ValueError as error:  # no file can have such a name
            raise UnreadableImage(shown(path), f"it is no path: {error}") from error
        return {"image": encoded, "label": 0, "name": shown(path)}


def image_paths(given: Sequence[str], left_out: LeftOut) -> list[str]:
    """The files meant, in the order given; those of a folder sorted, from all folders below it too.

    Folders are searched by `convert.image_files`; a file that is named itself is taken as it is. A name on standard
    input that cannot be used is kept: it fails when it is read, as an image that went away.

    Args:
        left_out: is told what is passed over in folders.

    Raises SettingsError if a PATH does not exist or is no file or folder, if there are no images at all, or if the list
    is too long; OSError if a folder cannot be read.
    """
    paths: list[str] = []
    for path in given:
        if path == STDIN:
            for name in _listed_on_stdin():
                paths += _images_of(name, left_out)
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


def _images_of(name: str, left_out: LeftOut) -> list[str]:
    """The images of a folder; any other name itself, and also that of a folder that cannot be read."""
    with contextlib.suppress(OSError):
        if os.path.isdir(name):
            return list(image_files(name, left_out=left_out))
    return [name]


def _listed_on_stdin() -> list[str]:
    """The paths of a list on standard input: one per line, or each with a NUL behind it, as `find -print0` has them.

    Text in UTF-16 or UTF-32 and byte order marks are known, as Windows writes them; otherwise any bytes are a file's
    name.
    """
    content = sys.stdin.buffer.read(_LONGEST_LIST + 1)
    if len(content) > _LONGEST_LIST:  # without an end, as of /dev/zero, it would fill the memory
        raise SettingsError(f"the list on standard input is longer than {_LONGEST_LIST:,} bytes: give it in parts")
    text = _wide(content)
    if text is None:
        text = os.fsdecode(content.removeprefix(codecs.BOM_UTF8))
    if text.rstrip("\r\n").endswith("\0") or ("\0" in text and "\n" not in text):
        return [name for name in text.split("\0") if name.strip("\r\n")]
    return [name for line in text.split("\n") if (name := line.rstrip("\r"))]


def _wide(content: bytes) -> str | None:
    """What bytes are in UTF-16 or UTF-32: with a byte order mark, or with lines that would hold NULs otherwise."""
    marks = {"utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)}
    for encoding, mark in marks.items():  # the longer first: it begins with the shorter
        if content.startswith(mark):
            return content.decode(encoding, errors="replace")
    for encoding in ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be"):
        with contextlib.suppress(UnicodeDecodeError):
            text = content.decode(encoding)
            if "\n" in text and "\0" not in text:
                return text
    return None
