"""The order of classes: timm sorts class folders naturally, class2 before class10; here they are sorted as text."""

import re
from collections import Counter
from collections.abc import Sequence

from convert.errors import ConversionError, listed
from convert.files import shown, typed_path
from crossvit_jax.files import read_regular

_LONGEST = 2**28  # bytes of a file of names
NATURAL, TEXT = "natural", "text"


def natural_key(name: str) -> list[int | str]:
    """By which timm sorts (timm/utils/misc.py): numbers by their value, letters whatever their case."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if place % 2 else part for place, part in enumerate(parts)]


def in_order(names: Sequence[str], order: str) -> tuple[str, ...]:
    """Class names in an order: `natural`, `text`, or that of a file of names, one a line.

    Raises ConversionError if a name stands for two classes, or a file cannot be read or has other names.
    """
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ConversionError(f"classes of the same name have no order: {listed(map(shown, twice))}")
    if order == NATURAL:
        return tuple(sorted(names, key=lambda name: (natural_key(name), name)))
    if order == TEXT:
        return tuple(sorted(names))
    listing = read_names(order)
    differences = {"not in the file": set(names) - set(listing), "only in the file": set(listing) - set(names)}
    told = [f"{where}: {_few(sorted(found))}" for where, found in differences.items() if found]
    if told:
        raise ConversionError(f"{order} names other classes than the data set: {'; '.join(told)}")
    return listing


def read_names(file: str) -> tuple[str, ...]:
    """The names in a file, one a line, as timm's --class-map has them.

    Raises ConversionError if it cannot be read, is no text, has an empty line between two names, or a name twice.
    """
    try:
        lines = read_regular(typed_path(file), at_most=_LONGEST).decode("utf-8-sig").splitlines()
    except OSError as error:
        raise ConversionError(
            f"{file} is neither {NATURAL} nor {TEXT}, nor a file of class names: {error.strerror}"
        ) from None
    except UnicodeDecodeError:
        raise ConversionError(f"{file}: class names are read from UTF-8 text, and this is none") from None
    names = [line.strip() for line in lines]
    while names and not names[-1]:
        names.pop()
    if not names or "" in names:
        where = f"line {names.index('') + 1} of {file} is empty" if names else f"{file} is empty"
        raise ConversionError(f"{where}: it should have one class name a line")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ConversionError(f"{file} names classes twice: {_few(twice)}")
    return tuple(names)


def unlike_timm(names: Sequence[str]) -> str | None:
    """Where the order of class names differs from timm's, in words; None if it does not."""
    for index, (here, in_timm) in enumerate(zip(names, sorted(names, key=natural_key), strict=True)):
        if natural_key(here) != natural_key(in_timm):
            return f"class {index} is {shown(here)!r}, and {shown(in_timm)!r} in timm's natural order"
    return None


def _few(names: Sequence[str]) -> str:
    return listed(map(shown, names[:5]), len(names))
