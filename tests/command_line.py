"""What every command line owes its user."""

import contextlib
import io
from collections.abc import Callable, Sequence


def refusal(capsys, program: str, main: Callable[[Sequence[str]], int], *args: object) -> str:
    """Runs a command that must be refused: one line on stderr that begins with its name, status 2. Returns the line."""
    try:
        status = main([str(arg) for arg in args])
    except SystemExit as stopped:
        status = stopped.code
    out, err = capsys.readouterr()
    assert status == 2
    assert out == ""
    assert err.startswith(f"{program}: error: ")
    assert err.count("\n") == 1
    return err


def printed_by(main: Callable[[Sequence[str]], int], *args: object) -> str:
    """Runs a command that must succeed. Returns what it printed, also where a fixture of a module calls it."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([str(arg) for arg in args]) == 0
    return out.getvalue()
