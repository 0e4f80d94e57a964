"""Which code ran, and how it was called."""

import shlex
import subprocess
import sys
from pathlib import Path

_FILE = Path(__file__).resolve()


def commit() -> str | None:
    """The commit of this code, with "-dirty" if tracked files were changed since; None where no repository has it."""
    git = ("git", "-C", str(_FILE.parent))
    if output_of(*git, "ls-files", "--error-unmatch", str(_FILE)) is None:
        return None  # installed in a folder that lies in somebody else's repository, perhaps
    return output_of(*git, "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty")


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
