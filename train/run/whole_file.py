"""A file that is there whole or not at all."""

import os
import threading
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name beside it, then rename it: nobody ever sees half of it.

    What was there before is replaced. Raises OSError if that is impossible; nothing new is left behind then.
    """
    temporary = path.with_name(f".{os.getpid()}-{threading.get_ident()}.partial")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
