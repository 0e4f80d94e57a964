"""How the commands of this project read their arguments, and how those of `convert` end."""

import argparse
import contextlib
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

from convert.errors import ConversionError


class Parser(argparse.ArgumentParser):
    """Takes no abbreviated flags, and answers a wrong command line with one line on stderr and exit status 2."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        sys.exit(2)


# --- how a conversion ends ---


def run(prog: str, command: Callable[[], int]) -> int:
    """A command's exit status: its own; 2 if an error stopped it, told in one line on stderr.

    130 for Ctrl-C and 143 for SIGTERM, as a shell has it; neither leaves anything half written.
    """
    try:
        with _heeding_sigterm():
            return command()
    except (ConversionError, MemoryError) as error:
        print(f"{prog}: error: {error or 'out of memory'}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    except _Terminated:
        print(f"{prog}: terminated", file=sys.stderr)
        return 143


def leave(status: int) -> NoReturn:
    """Ends the process; after an interruption at once: jax, stopped as it compiles, crashes on the usual way out."""
    if status > 128:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


class _Terminated(BaseException):
    """SIGTERM came. No `except Exception` is to hold it, as with KeyboardInterrupt."""


@contextlib.contextmanager
def _heeding_sigterm() -> Iterator[None]:
    """SIGTERM raises `_Terminated`, where it would end the process as it is: what was begun is removed on the way."""
    in_main_thread = threading.current_thread() is threading.main_thread()  # elsewhere Python allows no handlers
    if not in_main_thread or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:  # who has a handler wants that one
        yield
        return
    try:
        signal.signal(signal.SIGTERM, _terminate)
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not stop the removal
    raise _Terminated


# --- the types of flags; what they raise is told with the flag's name ---


def at_least_one(text: str) -> int:
    """A whole number, 1 or more."""
    if not (text.isascii() and text.isdigit() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"must be a whole number, 1 or more; got {text!r}")
    return int(text)


def at_least_zero(text: str) -> int:
    """A whole number, 0 or more."""
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"must be a whole number, 0 or more; got {text!r}")
    return int(text)


def share(text: str) -> float:
    """A number above 0 and at most 1."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1; got {text!r}")
    return value


def image_size(text: str) -> tuple[int, int]:
    """`240` or `240x480` as (height, width)."""
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text, re.ASCII)
    if not match:
        raise argparse.ArgumentTypeError(f"must be pixels such as 240, or HEIGHTxWIDTH such as 240x480; got {text!r}")
    return int(match[1]), int(match[2] or match[1])
