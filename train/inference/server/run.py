"""Runs the application until a signal ends it."""

import asyncio
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from convert.errors import SettingsError, UserError
from train.inference.server.app import Service, make_app

_BACKLOG = 2048
_KEEP_ALIVE = 75  # seconds that an idle connection stays open: longer than load balancers keep theirs (60 s)
_LOOK = 0.02  # seconds between two looks at whether all is answered


class NotAnswered(UserError):
    """The grace was over before all that had been accepted was answered."""

    status = 1


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address; port 0 is a free one. Raises SettingsError."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SettingsError(f"cannot listen at {address(host, port)}: {reason}") from None

    # connections inherit it; asyncio misses it on them, and an answer's end would wait 40 ms for an acknowledgement
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def serve(
    service: Service, listener: socket.socket, *, grace: float, log: Callable[[str], None], say: Callable[[str], None]
) -> int:
    """Serves until SIGTERM or Ctrl-C, then answers what was accepted; returns how many requests were answered not.

    Args:
        grace: seconds for that; a second signal ends it at once.
        say: told when the service is ready, and when it ends.
    """
    # uvicorn's own messages are of no use to who reads the log, but for its errors
    handler = logging.StreamHandler(sys.stderr)
    logging.basicConfig(handlers=[handler], format="%(levelname)s: %(message)s", level=logging.WARNING)
    for library in ("uvicorn", "python_multipart"):  # anybody's bad requests, which are answered, would fill a disk
        logging.getLogger(library).setLevel(logging.ERROR)
    config = uvicorn.Config(
        make_app(service, log=log),
        http=Connection,
        log_config=None,
        access_log=False,
        ws="none",
        lifespan="on",
        server_header=False,
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=grace,  # type: ignore[arg-type]
    )
    server = _Server(config, service, grace, say)
    asyncio.run(server.serve(sockets=[listener]))
    if server.failure is not None:
        raise server.failure
    return server.lost


class Connection(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """Is closed where the head of a request does not come, or not to its end, while an idle one would stay open; and
    where what comes is no HTTP, nobody waits for an answer to what came before."""

    _closing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._look_for_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look_for_head()

    def connection_lost(self, error: Exception | None) -> None:
        self._leave_open()
        super().connection_lost(error)

    def send_400_response(self, message: str) -> None:
        if self.cycle is not None and not self.cycle.response_complete:  # what comes behind a request is none
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        super().send_400_response(message)

    def _look_for_head(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:  # it is there
            self._leave_open()
        elif self._closing is None:
            self._closing = self.loop.call_later(self.timeout_keep_alive, self.transport.close)

    def _leave_open(self) -> None:
        if self._closing is not None:
            self._closing.cancel()
        self._closing = None


class _Server(uvicorn.Server):
    """Ends in good order: tells that it is not ready, refuses what comes, answers what it has, stops listening."""

    def __init__(self, config: uvicorn.Config, service: Service, grace: float, say: Callable[[str], None]):
        super().__init__(config)
        self.lost = 0
        self.failure: BaseException | None = None
        self._service, self._grace, self._say = service, grace, say
        self._tasks: list[asyncio.Task] = []

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()  # before a signal can come
        await super().serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._tasks.append(asyncio.create_task(self._make_ready()))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # not to uvicorn's list of signals, which it raises again at the end
        self._loop.call_soon_threadsafe(self._end, signal.Signals(sig).name)

    async def _make_ready(self) -> None:
        try:
            await self._service.start()
            self._say("ready")
        except Exception as error:
            self.failure, self.should_exit = error, True

    def _end(self, name: str) -> None:
        if self._service.ending:
            self.lost = self._service.admission.taken
            self.force_exit = self.should_exit = True
            return
        self._service.ending = True
        self._say(f"{name}: ending, once what was accepted is answered")
        self._tasks.append(asyncio.create_task(self._drain()))

    async def _drain(self) -> None:
        end = time.monotonic() + self._grace
        while self._service.admission.taken and time.monotonic() < end:
            await asyncio.sleep(_LOOK)
        self.lost = self._service.admission.taken
        left = 0.1 if self.lost else max(0.1, end - time.monotonic())
        self.config.timeout_graceful_shutdown = left  # type: ignore[assignment]
        self.should_exit = True
