"""Standard input, output and errors that every command can use, whatever it was started with."""

import codecs
import contextlib
import os
import sys
from typing import Any

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


def tell(line: str) -> None:
    """Prints a line at once. A closed terminal or a full disk is told once, and then nothing more is printed.

    Raises BrokenPipeError where nobody reads any more, as in `| head`.
    """
    try:
        print(line, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        let_go_of_output()
        tell_error(f"note: nothing more is printed: {error.strerror}")


def tell_error(line: str) -> None:
    """Prints a line on stderr. Does nothing where that takes nothing more: the exit status has to do."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        let_go_of_output()


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
