"""How the commands of this project read their arguments, and how they end."""

import argparse
import contextlib
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from convert.errors import UserError, one_line
from crossvit_jax.config import Branch


class Parser(argparse.ArgumentParser):
    """Takes no abbreviated flags, and answers a wrong command line with one line on stderr and exit status 2.

    A description or an epilog of several lines is shown as it is; what is one long line, argparse wraps.
    """

    def __init__(self, *, description: str = "", epilog: str = "", **kwargs):
        as_it_is = "\n" in description + epilog
        kwargs["formatter_class"] = argparse.RawDescriptionHelpFormatter if as_it_is else argparse.HelpFormatter
        super().__init__(allow_abbrev=False, description=description, epilog=epilog, **kwargs)

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        sys.exit(2)

    def _get_value(self, action: argparse.Action, text: str) -> Any:
        """A flag's value. argparse hides the message of a ValueError; that of a UserError is meant to be read."""
        try:
            return super()._get_value(action, text)
        except argparse.ArgumentError as error:
            if isinstance(error.__context__, UserError):
                raise argparse.ArgumentError(action, str(error.__context__)) from None
            raise


# --- how a command ends ---


def run(program: str, command: Callable[[], int], *, failure: int = 2, remedy: str = "") -> int:
    """A command's exit status: its own, or that of what stopped it, told in one line on stderr.

    That is the status of a UserError; `failure` where it has 1, and for errors of the operating system and too little
    memory; as a shell has it 130 for Ctrl-C, 143 for SIGTERM (what was begun is removed on the way), and 141 where
    nobody reads standard output any more.

    Args:
        remedy: what helps against too little memory.
    """
    out_of_memory = f"out of memory{': ' * bool(remedy)}{remedy}"
    try:
        with _heeding_sigterm():
            status = command()
            sys.stdout.flush()
            return status
    except UserError as error:
        status = failure if error.status == 1 else error.status
        return _stopped(program, f"{'error: ' * (status < 128)}{error}", status)
    except BrokenPipeError:
        _let_go_of_stdout()
        return 141
    except OSError as error:  # a full disk, say
        _let_go_of_stdout()
        place = f"{error.filename}: " if error.filename else ""
        return _stopped(program, f"error: {place}{error.strerror or one_line(error)}", failure)
    except MemoryError:
        return _stopped(program, f"error: {out_of_memory}", failure)
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):  # XLA's way to say that the devices have too little memory
            raise
        return _stopped(program, f"error: the devices are {out_of_memory}", failure)
    except KeyboardInterrupt:
        return _stopped(program, "interrupted", 130)
    except _Terminated:
        return _stopped(program, "terminated", 143)


def leave(status: int) -> NoReturn:
    """Ends the process; after an interruption at once: jax, stopped as it compiles, crashes on the usual way out."""
    jax = sys.modules.get("jax")
    # the other processes of a run would miss one that leaves without a word
    if status > 128 and not (jax and jax.distributed.is_initialized()):
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def _stopped(program: str, message: str, status: int) -> int:
    print(f"{program}: {message}", file=sys.stderr, flush=True)
    return status


def _let_go_of_stdout() -> None:
    """Where standard output takes nothing more, throw away what it holds: Python would complain on its way out."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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


def at_least_zero(text: str, *, least: int = 0) -> int:
    """A whole number, 0 or more."""
    if not (text.isascii() and text.isdigit() and int(text) >= least):
        raise argparse.ArgumentTypeError(f"must be a whole number, {least} or more; got {text!r}")
    return int(text)


def at_least_one(text: str) -> int:
    """A whole number, 1 or more."""
    return at_least_zero(text, least=1)


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


def branch(text: str) -> Branch:
    """The settings of a branch, see `Branch.parse`."""
    try:
        return Branch.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
