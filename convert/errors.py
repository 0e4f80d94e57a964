"""The one exception of this package, and how other libraries' errors become one line of ours."""

import contextlib
import logging
from collections.abc import Iterator


class ConversionError(ValueError):
    """What was asked cannot be done; the message is one line for the person who asked."""


def one_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type where it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextlib.contextmanager
def quiet(logger_name: str) -> Iterator[None]:
    """Silences the log of a library that logs what it raises as well."""
    logger = logging.getLogger(logger_name)
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
