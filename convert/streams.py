"""Standard input, output and errors that every command can use, whatever it was started with."""

import codecs
import contextlib
import os
import sys
from typing import Any

_LONGEST = 10_000  # characters of a message
_ERRORS = "crossvit-escape"


def open_streams() -> None:
    """Makes standard input, output and errors usable for the rest of the process. To be called again does no harm.

    - A closed descriptor (`>&-`, a daemon) gets the null device. Otherwise the next file that is opened has its number,
      and what libraries print goes into that file.
    - A stream that is None or closed (pythonw, a daemon) reads and writes nothing.
    - A character that the encoding does not have is written with a backslash. Bytes of a file name that are no text
      stay as they are.

    Streams that are no files, such as a notebook's, are left as they are.
    """
    for number in range(3):  # all of them before a file is opened
        try:
            os.fstat(number)
        except OSError:
            _to_null_device(number)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None or getattr(stream, "closed", False):
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (for the rest of the process)
        elif mode == "w" and getattr(stream, "errors", None) in ("strict", "surrogateescape"):
            reconfigure(stream, errors=_ERRORS)


def reconfigure(stream: Any, **settings: str) -> None:
    """Changes encoding or error handler of a stream, where that is possible."""
    if hasattr(stream, "reconfigure"):
        with contextlib.suppress(OSError):  # its descriptor is another kind of file by now
            stream.reconfigure(**settings)


def safe(text: str, *, lines: bool = False) -> str:
    """Text that may be anybody's, such as names in a file, as any terminal can show it.

    What cannot be printed, and would move the cursor or change colours there, is written as `\\x1b` or `\\udcff`; of
    what is too long for anybody to read, the middle is left out.

    Args:
        lines: whether it is of several lines, which it keeps.
    """
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 4 :]}"
    if text.isprintable():
        return text
    kept = "\n" if lines else ""
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


def tell(line: str) -> None:
    """Prints a line, or several, at once and as `safe` has them.

    A run of weeks does not end of its printing: a closed terminal, a full disk or a pipe that nobody reads any more, as
    in `| head`, is told once, and then nothing more is printed.
    """
    try:
        _write(sys.stdout, safe(line, lines=True))
    except OSError as error:
        let_go_of_output()
        tell_error(f"note: nothing more is printed: {error.strerror}")


def tell_error(line: str) -> None:
    """Prints a line on stderr, as `safe` has it. Does nothing where that takes nothing more: the status has to do."""
    try:
        _write(sys.stderr, safe(line))
    except OSError:
        let_go_of_output()


def _write(stream: Any, line: str) -> None:
    """In one piece: what other threads and processes print at the same time does not come into its middle."""
    stream.write(f"{line}\n")
    stream.flush()


def let_go_of_output() -> None:
    """Throws away what output and errors hold where they take nothing more: Python would complain on its way out."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError):  # it has no descriptor
                _to_null_device(stream.fileno())


def _to_null_device(number: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, number)  # inheritable, as the first three are
    if null == number:
        os.set_inheritable(number, True)
    else:
        os.close(null)


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    is_byte = "\udc80" <= character <= "\udcff"  # as Python writes bytes of a file name that are no text
    escaped = bytes([ord(character) - 0xDC00]) if is_byte else character.encode("ascii", "backslashreplace").decode()
    return escaped, error.start + 1


codecs.register_error(_ERRORS, _escape)
