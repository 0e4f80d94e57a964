"""Paths as people type them, and files that are there whole or not at all."""

import contextlib
import csv
import errno
import io
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from convert.errors import ConversionError, one_line

# before the path of a folder of images, the path of a CSV file that lists some, and the name or folder of a data set of
# Hugging Face; other data sets have a name alone
FOLDER_PREFIX, CSV_PREFIX, HF_PREFIX = "folder:", "csv:", "hf:"
LOCAL_PREFIX = "local-dir:"  # timm's, before the path of a folder with weights
# with one slash too where pathlib may have made it of two, and nobody names a folder so
_STORES = "abfss?|dbfs|file|gs|hdfs|https?|s3"
_ADDRESS = re.compile(rf"((?i:{_STORES})(?=:/)|[A-Za-z][A-Za-z0-9+.-]+(?=://)):/+(.*)", re.DOTALL)
_COPIED_BY = {"gs": " with gcloud storage cp -r", "s3": " with aws s3 cp --recursive"}
_FORMULA, _NUMBER = ("=", "+", "-", "@", "\t", "\r"), re.compile(r"[+-]?\d+(\.\d*)?(e[+-]?\d+)?", re.ASCII)
_SHOWN = 32  # characters of a destination's name in that of its temporary folder


# --- names ---


def local_path(text: str) -> str:
    """The text, if it can be a path.

    Raises:
        ConversionError: a NUL is in it, or it is an address such as gs://bucket/run or https://host/file.
    """
    if "\0" in text:
        raise ConversionError(f"{shown(text)} is no path: a NUL is in it")
    address = _ADDRESS.fullmatch(text)
    if address is None:
        return text
    scheme, rest = address[1].lower(), address[2]
    repository = re.match(r"(?:hf://|https?://(?:www\.)?(?:huggingface\.co|hf\.co)/)([\w.-]+/[\w.-]+)", text)
    if scheme == "file":
        what_to_do = f"name the path itself: /{rest.lstrip('/')}"
    elif repository:
        what_to_do = f"weights on the Hugging Face hub are hf-hub:{repository[1]}"
    elif scheme in ("http", "https"):
        what_to_do = "download it with curl -LO, and name the file"
    else:
        what_to_do = f"use a path here, and copy{_COPIED_BY.get(scheme, '')}"
    raise ConversionError(f"{shown(text)} is an address, not a path on this machine: {what_to_do}")


def typed_path(path: str | Path) -> Path:
    """The path, with the home folder in place of `~` or `~name`.

    Raises:
        ConversionError: it is an address or has a NUL, nobody's home folder is meant, or a name is too long for a file.
    """
    local_path(str(path))
    try:
        path = Path(path).expanduser()
        os.lstat(path)
    except RuntimeError:
        raise ConversionError(f"{path}: {Path(path).parts[0]} is nobody's home folder") from None
    except OSError as error:  # that nothing is there, or cannot be read, matters to some only
        if error.errno == errno.ENAMETOOLONG:  # here, since Path.is_file and the like raise that
            raise ConversionError(f"{path}: {error.strerror}") from None
    return path


def home_path(text: str) -> str:
    """A path as it was typed, but for the home folder in place of `~` or `~name`.

    Raises ConversionError as `typed_path` does, and for an empty text, as of a shell's variable that is not set.
    """
    if not text:
        raise ConversionError("a path is needed, and the text is empty")
    path = typed_path(text)
    return str(path) if text.startswith("~") else text


def shown(path: str) -> str:
    """A path as one line of text that any terminal takes: what cannot be printed is written as `\\n` or `\\udcff`."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in path)


# --- writing ---


class NotWritten(ConversionError):
    """Knows the reason without the path: a file that is written on the way to another has a temporary one."""

    status = 1

    def __init__(self, path: Path, reason: str):
        super().__init__(path, reason)  # the arguments as they are, so that it can be pickled
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path} could not be written: {self.reason}"


def check_place(path: Path, *, overwrite: bool = False, own: Sequence[str] | None = None) -> Path:
    """The path, if a file or a folder can be written there.

    Args:
        own: where a folder is to be written: all that is written into one, the first of it always; None: a file is.

    Raises:
        ConversionError: a missing folder, one that cannot be written to, or something is there that may not be
            replaced.
    """
    if not path.parent.is_dir():
        raise ConversionError(f"{path}: the folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ConversionError(f"{path}: the folder {path.parent} cannot be written to")
    if not os.path.lexists(path):
        return path
    if not overwrite:
        raise ConversionError(f"{path} exists; --overwrite (overwrite=True) replaces it")
    if path.is_dir() != (own is not None):
        raise ConversionError(f"{path} is a {'folder' if path.is_dir() else 'file'}, and is not replaced by the other")
    there = set() if own is None else {entry.name for entry in path.iterdir()}
    others = sorted(there - {Path(name).parts[0] for name in own or ()})
    if there and (others or not (path / own[0]).is_file()):
        such = f", such as {shown(others[0])}," if others else ""
        raise ConversionError(f"{path} is a folder of other things{such} and is not replaced")
    return path


def check_replaceable(
    targets: Iterable[Path], is_own: Callable[[Path], bool], *, inputs: Iterable[str | Path] = ()
) -> None:
    """Whether files may be written whose names nobody typed: called before the first of them is.

    Args:
        targets: the files to be written.
        is_own: whether a file that is there was written by the same command before, and may be replaced.
        inputs: files that are read: they are never replaced, under whatever name and through whatever link.

    Raises:
        ConversionError: one of the targets may not be replaced.
    """
    there = [path for path in targets if os.path.lexists(path)]
    if not there:
        return
    read = set(map(_identity, inputs)) - {None}
    for path in there:
        if _identity(path) in read:
            raise ConversionError(f"{path} is one of the files to be read, and is not replaced: name another place")
        if not is_own(path):
            raise ConversionError(f"{path} exists and was not written by this command: name another place")


def _identity(path: str | Path) -> tuple[int, int] | None:
    """The same for all names of a file; None where there is none."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # no name of any file
        return None
    return found.st_dev, found.st_ino


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Whatever is raised while a file or a folder is made and written is raised as NotWritten."""
    try:
        yield
    except Exception as error:  # besides OSError, whatever drawing, Orbax, tensorstore and exporters raise
        raise NotWritten(path, _reason(error)) from None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to. What is there at the end is moved to `path`, if anything is.

    Raises:
        NotWritten: anything at all was raised while it was written; nothing new is left behind then.
    """
    prefix = f".{path.name[:_SHOWN]}."  # the whole name may be as long as names can be
    with (
        writing(path),
        tempfile.TemporaryDirectory(prefix=prefix, suffix=".partial", dir=path.parent) as partial,
    ):
        new = Path(partial, "new")
        yield new
        if new.exists():
            _move(new, path, aside=Path(partial, "replaced"))


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Writes a file so that nobody ever sees half of it; what was there before is replaced. Raises NotWritten."""
    with replacing(path) as new:
        write_bytes(new, data)


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    """Rows as the text of a CSV file.

    Texts that spreadsheets would take for a formula, and compute, get an apostrophe before them, by which these show
    them as they are. Nothing else is changed: a path can be found again by its bytes.
    """
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(map(_cell, row) for row in rows)
    return text.getvalue()


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return f"'{value}" if value.startswith(_FORMULA) and not _NUMBER.fullmatch(value) else value


def write_bytes(path: Path, *parts: bytes | memoryview) -> None:
    """Writes a file, and waits until the disk has it."""
    with path.open("wb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())  # or after a power cut the new name may stand for an empty file


def _move(new: Path, path: Path, aside: Path) -> None:
    """Puts `new` at `path`. A folder there cannot be replaced in one step: it goes aside and comes back on failure."""
    if not path.is_dir():
        os.replace(new, path)
        return
    path.rename(aside)
    try:
        new.rename(path)
    except BaseException:
        aside.rename(path)
        raise


def _reason(error: Exception) -> str:
    if isinstance(error, NotWritten):
        return error.reason
    if "No space left on device" in str(error):  # also in the middle of tensorstore's messages
        return "no space left on device"
    return (error.strerror if isinstance(error, OSError) else None) or one_line(error)
