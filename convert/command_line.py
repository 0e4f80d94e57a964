"""How the commands of this project read their arguments."""

import argparse
import re
import sys
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Takes no abbreviated flags, and answers a wrong command line with one line on stderr and exit status 2."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        sys.exit(2)


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
