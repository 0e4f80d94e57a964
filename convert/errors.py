"""The errors that a command tells in one line, and how names and other libraries' errors fit into one."""

import contextlib
import functools
import importlib.util
import logging
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from crossvit_jax.extras import extra_of, needs

_NAMES_IN_A_MESSAGE = 20


class UserError(Exception):
    """The message is one line for the person who asked, shown as it is; `status` is the command's exit status then.

    2: a mistake in what was asked for. 1: what was asked for failed; a command may have another status for that, see
    `convert.command_line.run`. Above 128: it was stopped, which is no error.
    """

    status = 2


class ConversionError(UserError, ValueError):
    """What was asked of weights or files cannot be done."""


class SettingsError(UserError, ValueError):
    """A mistake in what was asked of a run."""


class MissingExtra(UserError, ImportError):
    """A package is needed that an extra of the installation brings; the message names both."""


def require(what: str, *packages: str, extra: str | None = None, otherwise: str = "", verb: str = "needs") -> None:
    """Raises MissingExtra where one of the packages is not installed: before the work that needs it.

    Args:
        what: needs them, in words.
        packages: as they are imported.
        extra: that brings all of them; none: that of the first one that is missing.
        otherwise: what may be asked for instead.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        line = needs(what, missing, extra or extra_of(missing[0]), verb=verb)
        raise MissingExtra(f"{line}; or {otherwise}" if otherwise else line)


def missing_extra(error: ImportError) -> MissingExtra | None:
    """What a failed import means to the user, where an extra brings the package; else None."""
    package = (error.name or "").partition(".")[0]
    extra = extra_of(package)
    return None if extra is None else MissingExtra(needs("this", [package], extra))


def one_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type where it has none; of a MemoryError what it means."""
    name = "out of memory" if isinstance(error, MemoryError) else type(error).__name__
    return next((line.strip() for line in str(error).splitlines() if line.strip()), name)


def listed(names: Iterable[str], count: int | None = None) -> str:
    """Names for a message, at most 20 of them: `a, b, c`, or `a, b, … and 7 more`.

    Args:
        count: how many there are, where not all names are known.
    """
    names = list(names)
    shown = names[:_NAMES_IN_A_MESSAGE]
    more = (len(names) if count is None else count) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


@contextlib.contextmanager
def quiet_storage() -> Iterator[None]:
    """Silences what Orbax and tensorstore tell of a failure beside the exception that they raise.

    Some of it comes later, when what has failed is thrown away: that is silenced for the rest of the process.
    """
    _silence_left_overs()
    with quiet("absl"), quiet("asyncio"):
        yield


def silence_storage() -> None:
    """Silences Orbax for the rest of the process: threads of what has failed go on, and fail one after the other."""
    logging.getLogger("absl").setLevel(logging.CRITICAL + 1)


@functools.cache
def _silence_left_overs() -> None:
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        # a future of tensorstore's, done after the loop that waited for it was closed by another failure
        if isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed":
            return
        before(unraisable)

    sys.unraisablehook = hook
    logging.getLogger("asyncio").addFilter(lambda record: not _is_of_storage(record))
    warnings.filterwarnings("ignore", "coroutine '.*' was never awaited", RuntimeWarning, r"(.*\.)?(orbax|absl)\b.*")


def _is_of_storage(record: logging.LogRecord) -> bool:
    """Whether asyncio tells of a task that nobody asked for any more, and which was Orbax's."""
    frame = record.exc_info[2] if record.exc_info else None
    while frame is not None:
        if "orbax" in frame.tb_frame.f_code.co_filename:
            return True
        frame = frame.tb_next
    return "orbax" in record.getMessage() or "tensorstore" in record.getMessage()


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
