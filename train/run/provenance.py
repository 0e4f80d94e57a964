"""Which code ran, and how it was called."""

import shlex
import subprocess
import sys
from pathlib import Path

_FILE = Path(__file__).resolve()


def commit() -> str | None:
    """The commit of this code, with "-dirty" if tracked files were changed since; None where no repository has it."""
    tracked = output_of(
        "git", "-C", str(_FILE.parent), "ls-files", "--error-unmatch", str(_FILE)
    )  # else it is another's
    if tracked is None:
        return None
    return output_of("git", "-C", str(_FILE.parent), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty")


def command_line() -> str:
    """What started this process, as a shell would read it."""
    return shlex.join(sys.orig_argv)


def output_of(*command: str) -> str | None:
    """What a command prints; None if there is no such command or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
