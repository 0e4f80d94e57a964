"""What the server accepts, what it refuses, and how a refusal is told."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The bounds of a server."""

    pictures: int  # that are in the server at once: being read, waiting or computed
    batching_delay: float = 0.005  # seconds that a picture waits for others to share its batch
    deadline: float = 10.0  # seconds from a request to its answer
    body_bytes: int = 32 * 2**20  # of a request
    pixels: int = 50_000_000  # of a picture
    overload_status: int = 503  # where there are too many pictures
    token: str | None = field(default=None, repr=False)  # that requests have to bear


class Refusal(Exception):
    """A request that is not answered as it wishes: the status, and one line for who asked."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.headers = status, message, dict(headers or {})


class Admission:
    """Counts the pictures in the server, so that they are never more than it may hold."""

    def __init__(self, limits: Limits):
        self.taken = 0
        self.seconds_per_picture = 0.05  # what a picture takes of the devices; the batcher measures it
        self._limits = limits

    def take(self, pictures: int) -> None:
        """Makes room for so many more. Raises Refusal."""
        most = self._limits.pictures
        if pictures > most:
            raise Refusal(413, f"{pictures} pictures in a request; at most {most} can be in the server at once")
        if self.taken + pictures > most:
            wait = max(1, round(self.taken * self.seconds_per_picture))
            message = f"the server is full: {self.taken} pictures are waiting, of at most {most}"
            raise Refusal(self._limits.overload_status, message, {"Retry-After": str(wait)})
        self.taken += pictures

    def leave(self, pictures: int) -> None:
        """They have been answered, or refused."""
        self.taken -= pictures
