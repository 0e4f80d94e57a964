"""The console command `crossvit`, which is `python -m train` too: one name for all commands.

As a script it has its own folder on Python's path and not the current one, so that a user's `train.py` or `convert.py`
there is not what is run.
"""

import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from convert.command_line import Program, leave
from convert.streams import open_streams, tell, tell_error
from crossvit_jax import __version__

# by name: the module whose `main` it is, what it does
_COMMANDS = {
    "train": ("train.main", "train, evaluate, and leave everything in a folder"),
    "evaluate": ("train.evaluate", "the accuracy of weights on a data set"),
    "predict": ("train.predict", "the most probable classes of images, or what is found in them"),
    "convert": ("convert.__main__", "weights between timm, torch, Flax, safetensors and Orbax, or a model's export"),
    "compile": ("train.compile", "what a training step takes and costs on machines that are not here"),
    "serve": ("train.serve", "answer pictures over HTTP"),
}
_USAGE = "usage: crossvit COMMAND ...; crossvit COMMAND --help tells its flags"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that the first argument names with the others; returns its exit status, 2 for an unknown one."""
    open_streams()
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name in _COMMANDS:
        module, _ = _COMMANDS[name]
        Program.typed = f"crossvit {name}"
        try:
            return importlib.import_module(module).main(rest)
        finally:
            Program.typed = None
    if name in ("-h", "--help"):
        width = max(map(len, _COMMANDS))
        tell("\n".join([_USAGE, "", *(f"  {name:{width}}  {does}" for name, (_, does) in _COMMANDS.items())]))
        return 0
    if name == "--version":
        tell(f"crossvit {__version__}")
        return 0
    got = f"got {name!r}" if name else "none was given"
    tell_error(f"crossvit: error: COMMAND is one of {', '.join(_COMMANDS)}; {got}")
    return 2


def console() -> NoReturn:
    """Runs the command line and ends the process."""
    # a server is not waited for: its threads may compile for minutes
    leave(main(), at_once=sys.argv[1:2] == ["serve"])


if __name__ == "__main__":
    console()
