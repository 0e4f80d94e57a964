"""How the commands of this project read their arguments, and how those of `convert` end."""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
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
    """A command's exit status: its own; 2 if an error stopped it, told in one line on stderr; 130 for Ctrl-C."""
    try:
        return command()
    except (ConversionError, MemoryError) as error:
        print(f"{prog}: error: {error or 'out of memory'}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130


def tell_result(path: Path, comparison: object, *, kept: bool) -> int:
    """Prints whether a file was kept, and how far it is from its source; returns the exit status."""
    size = f", {path.stat().st_size:,} bytes" if kept else ""
    print(f"{'written    ' if kept else 'NOT written'} {path}{size}")
    print(f"compared    {comparison}")
    return 0 if kept else 1


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
