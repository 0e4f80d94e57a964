"""How the commands of this project read their arguments, and how they end."""

import argparse
import contextlib
import difflib
import functools
import multiprocessing
import multiprocessing.util
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from convert.errors import UserError, missing_extra, one_line
from convert.files import CSV_PREFIX, FOLDER_PREFIX, HF_PREFIX, home_path, local_path
from convert.formats import hub
from convert.streams import let_go_of_output, open_streams, tell_error
from crossvit_jax.config import REDUCTIONS, Branch, shown_value

UNGUARDED = (
    "a script that starts worker processes is run by each of them once more: put what it does below "
    "`if __name__ == '__main__':`"
)
RUN_ANEW = 66  # exit status of a worker process in which the script that started it runs once more
# how XLA says that the devices have too little; and its kernels for CPUs, which fail for nothing else
_TOO_LITTLE_MEMORY = ("RESOURCE_EXHAUSTED", "YNNPACK operation failed")
# a scheduler's end, a closed terminal, a scheduler's warning; Windows has the first only
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))


class Program:
    """The name that a command goes by in its messages: `python -m MODULE`, or what was typed in place of that."""

    typed: str | None = None  # of all commands of this process

    def __init__(self, module: str):
        self.as_module = f"python -m {module}"

    def __str__(self) -> str:
        return Program.typed or self.as_module


class Parser(argparse.ArgumentParser):
    """Takes no abbreviated flags, and answers a wrong command line with one line on stderr and exit status 2.

    Reading the arguments is what every command begins with, so it also opens the standard streams.

    A description or an epilog of several lines is shown as it is; what is one long line, argparse wraps.

    Args:
        meant: flags that other programs have, and what is to be given here instead: told where one is given.
    """

    def __init__(
        self,
        *,
        prog: str | Program,
        description: str = "",
        epilog: str = "",
        meant: Mapping[str, str] | None = None,
        **kwargs,
    ):
        if isinstance(prog, Program):
            epilog = epilog.replace(prog.as_module, str(prog))  # the examples
        as_it_is = "\n" in description + epilog
        kwargs["formatter_class"] = argparse.RawDescriptionHelpFormatter if as_it_is else argparse.HelpFormatter
        super().__init__(prog=str(prog), allow_abbrev=False, description=description, epilog=epilog, **kwargs)
        self._meant = meant or {}

    def parse_args(self, args=None, namespace=None):
        namespace, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._hint(unknown)}")
        return namespace

    def parse_known_args(self, args=None, namespace=None):
        open_streams()
        return super().parse_known_args(args, namespace)

    def _hint(self, unknown: Sequence[str]) -> str:
        """What to give in place of the first flag that there is not, as far as that can be told."""
        flag = next((text.partition("=")[0] for text in unknown if text.startswith("-")), "")
        if flag in self._meant:
            return f"; here that is {self._meant[flag]}"
        known = [text for text in self._option_string_actions if text.startswith("--")]
        near = difflib.get_close_matches(flag.replace("_", "-"), known, n=1, cutoff=0.7)
        return f"; did you mean {near[0]}?" if near else ""

    def error(self, message: str) -> NoReturn:
        tell_error(f"{self.prog}: error: {message}")
        self.exit(2)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        let_go_of_output()  # nobody may have read --help to its end
        super().exit(status, message)

    def _get_value(self, action: argparse.Action, text: str) -> Any:
        """A flag's value. argparse hides the message of a ValueError; that of a UserError is meant to be read."""
        try:
            return super()._get_value(action, text)
        except argparse.ArgumentError as error:
            if isinstance(error.__context__, UserError):
                raise argparse.ArgumentError(action, str(error.__context__)) from None
            raise


# --- how a command ends ---


def run(program: str | Program, command: Callable[[], int], *, failure: int = 2, remedy: str = "") -> int:
    """A command's exit status: its own, or that of what stopped it, told in one line on stderr.

    That is the status of a UserError; 2 where a package is missing that an extra brings; `failure` where it has 1, and
    for errors of the operating system and too little memory; as a shell has it 130 for Ctrl-C, 143, 129 or 138 for
    SIGTERM, SIGHUP or SIGUSR1 (what was begun is removed), and 141 where nobody reads standard output any more.

    Does not return in a worker process that runs a script without a main guard once more.

    Args:
        remedy: what helps against too little memory.
    """
    out_of_memory = f"out of memory{': ' * bool(remedy)}{remedy}"
    open_streams()
    leave_if_run_anew()
    try:
        with _heeding_signals():
            status = command()
            sys.stdout.flush()
            return status
    except UserError as error:
        status = failure if error.status == 1 else error.status
        return _stopped(program, f"{'error: ' * (status < 128)}{error}", status)
    except ModuleNotFoundError as error:
        missing = missing_extra(error)
        if missing is None:
            raise
        return _stopped(program, f"error: {missing}", missing.status)
    except BrokenPipeError:
        let_go_of_output()
        return 141
    except OSError as error:  # a full disk, say
        let_go_of_output()
        place = f"{error.filename}: " if error.filename else ""
        return _stopped(program, f"error: {place}{error.strerror or one_line(error)}", failure)
    except MemoryError:
        return _stopped(program, f"error: {out_of_memory}", failure)
    except RuntimeError as error:
        if not any(words in str(error) for words in _TOO_LITTLE_MEMORY):
            raise
        return _stopped(program, f"error: the devices are {out_of_memory}", failure)
    except KeyboardInterrupt:
        return _stopped(program, "interrupted", 130)
    except _Terminated as error:
        return _stopped(program, "terminated", 128 + error.number)


def leave_if_run_anew() -> None:
    """Ends a worker process in which the script that started it runs once more, since it has no main guard.

    Python's way to start a process imports the script. Without this, a run would start within each worker of a run.
    """
    process = multiprocessing.current_process()
    if not getattr(process, "_inheriting", False):  # as multiprocessing itself finds it out
        return
    if not process.name.startswith("grain-"):  # of those, the process that started them tells; see train.data.workers
        tell_error(f"error: {UNGUARDED}")
    os._exit(RUN_ANEW)


def leave(status: int, *, at_once: bool = False) -> NoReturn:
    """Ends the process; after an interruption at once: jax, stopped as it compiles, crashes on the usual way out.

    Args:
        at_once: in any case, without waiting for threads, which may compile for minutes.
    """
    jax = sys.modules.get("jax")
    # the other processes of a run would miss one that leaves without a word
    if (status > 128 or at_once) and not (jax and jax.distributed.is_initialized()):
        let_go_of_output()
        multiprocessing.util._run_finalizers(0)  # or Python tells of semaphores that were left behind
        os._exit(status)
    sys.exit(status)


def _stopped(program: str | Program, message: str, status: int) -> int:
    tell_error(f"{program}: {message}")
    return status


class _Terminated(BaseException):
    """A signal came. No `except Exception` is to hold it, as with KeyboardInterrupt."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def _heeding_signals() -> Iterator[None]:
    """Signals that would end the process as it is raise `_Terminated`: what was begun is removed on the way."""
    heeded: list[int] = []
    if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
        # who has a handler wants that one, and nohup has its processes ignore SIGHUP
        heeded = [number for number in _SIGNALS if signal.getsignal(number) == signal.SIG_DFL]
    try:
        for number in heeded:
            signal.signal(number, functools.partial(_terminate, heeded))
        yield
    finally:
        for number in heeded:
            signal.signal(number, signal.SIG_DFL)


def _terminate(heeded: list[int], number: int, _: object) -> NoReturn:
    for other in heeded:
        signal.signal(other, signal.SIG_IGN)  # a second one must not stop the removal
    raise _Terminated(number)


# --- the types of flags; what they raise is told with the flag's name ---


def at_least_zero(text: str, *, least: int = 0) -> int:
    """A whole number, 0 or more."""
    if not (re.fullmatch(r"[0-9]{1,15}", text) and int(text) >= least):  # Python reads no text of thousands of digits
        raise argparse.ArgumentTypeError(f"must be a whole number, {least} or more; got {shown_value(text)}")
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


def threshold(text: str) -> float:
    """A number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1; got {text!r}")
    return value


def above_zero(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0; got {text!r}")
    return value


def weights_source(text: str) -> str:
    """What `convert.load_weights` takes: a path, or a repository on the hub. Raises ConversionError for an address."""
    return text if text.startswith(hub.PREFIXES) else local_path(text)


def data_set(text: str) -> str:
    """The name of a data set, or `folder:`, `csv:` or `hf:` and a path as `home_path` returns it. Raises as that does.

    The path of a folder that is there is taken for one, unless it is `digits` or has what tensorflow-datasets prepares.
    """
    for prefix in (FOLDER_PREFIX, CSV_PREFIX, HF_PREFIX):
        if text.startswith(prefix):
            return prefix + home_path(text.removeprefix(prefix))
    folder = Path(home_path(text))
    if text == "digits" or not folder.is_dir():
        return text
    is_prepared = any(any(folder.glob(f"{below}dataset_info.json")) for below in ("", "*/"))
    return text if is_prepared else f"{FOLDER_PREFIX}{folder}"


def image_size(text: str) -> tuple[int, int]:
    """`240` or `240x480` as (height, width)."""
    match = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text, re.ASCII)
    if not match:
        got = shown_value(text)
        raise argparse.ArgumentTypeError(f"must be pixels such as 240, or HEIGHTxWIDTH such as 240x480; got {got}")
    return int(match[1]), int(match[2] or match[1])


def patch_size(text: str) -> tuple[int, ...]:
    """`24,32` as the pixels of the patches of each branch."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"must be pixels, a number for each branch, such as 24,32; got {text!r}")
    return tuple(map(int, text.split(",")))


def reduce_tokens(text: str) -> str:
    """`merge:8`, `fusion:0.7`, `prune:0.7`, or `none`; the numbers are checked with the model's branches."""
    if text != "none" and text.partition(":")[0] not in REDUCTIONS:
        raise argparse.ArgumentTypeError(
            f"must be merge:N, fusion:SHARE, prune:SHARE, such as merge:8 or fusion:0.7, or none; got {text!r}"
        )
    return text


def prune(text: str) -> dict[str, tuple[float, ...]]:
    """`mlp=0.5,heads=0.67`: of neurons and heads the shares that are kept; `mlp=1:0.5` has one for each branch."""
    shares = {}
    for part in text.split(","):
        kind, _, numbers = part.partition("=")
        try:
            values = tuple(map(float, numbers.split(":")))
        except ValueError:
            values = ()
        if kind not in ("mlp", "heads") or kind in shares or not values or not all(0 < value <= 1 for value in values):
            raise argparse.ArgumentTypeError(
                "must be mlp=SHARE, heads=SHARE, or both such as mlp=0.5,heads=0.67: what is kept of hidden neurons "
                f"and of heads, above 0 and at most 1; got {shown_value(text)}"
            )
        shares[kind] = values
    return shares


def branch(text: str) -> Branch:
    """The settings of a branch, see `Branch.parse`."""
    try:
        return Branch.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
