"""What people look at beside a run's results: it is made where that is possible, and never ends a run."""

from collections.abc import Callable
from typing import Any

from convert.errors import one_line


class BestEffort:
    """One thing that can be done without, such as curves: its first failure is told, and it is not tried again.

    Called with a function and its arguments, it returns what that returns, or None after a failure of any kind. What
    somebody asked for is not for it: see `convert.files.writing`.
    """

    def __init__(self, name: str, say: Callable[[str], None]):
        """
        Args:
            name: of the thing, in words.
            say: told one line, without an end.
        """
        self._name, self._say = name, say
        self._failed = False

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any | None:
        if self._failed:
            return None
        try:
            return function(*args, **kwargs)
        except Exception as error:  # whatever drawing, logging and their packages raise
            self._failed = True
            self._say(f"note: {self._name}: {one_line(error)}; left out from now on")
            return None
