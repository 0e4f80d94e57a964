"""Load for a server: HTTP requests over connections that stay open, from one thread. Imports nothing of jax."""

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

_LONGEST_WAIT = 60.0  # seconds for an answer


@dataclass
class Load:
    """What came of some load."""

    start: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0  # from its start to the last answer
    statuses: Counter = field(default_factory=Counter)  # 0: there was no answer
    waits: list[float] = field(default_factory=list)  # seconds of those answered with 200, from when they were due

    def quantile(self, share: float) -> float | None:
        """Of the waits; none where nothing was answered."""
        waits = sorted(self.waits)
        return waits[min(len(waits) - 1, int(share * len(waits)))] if waits else None

    @property
    def rate(self) -> float:
        """Of answers with 200."""
        return len(self.waits) / self.seconds

    def as_json(self) -> dict[str, Any]:
        asked = sum(self.statuses.values())
        return {
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "answered_per_s": self.rate,
            "rejected": (asked - self.statuses[200]) / asked if asked else 0.0,
            "p50_s": self.quantile(0.5),
            "p99_s": self.quantile(0.99),
        }


class _Connections:
    """Sends bodies to one path of a server; connections are opened as they are needed, and used again."""

    def __init__(self, address: str):
        self._host, self._port = address.rsplit(":", 1)
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self, load: Load, body: bytes, due: float) -> None:
        """Asks once, and counts the answer; its wait began when it was due."""
        try:
            async with asyncio.timeout(_LONGEST_WAIT):
                status = await self._status(body)
        except (OSError, EOFError, TimeoutError):
            status = 0
        load.statuses[status] += 1
        if status == 200:
            load.waits.append(time.perf_counter() - due)

    async def _status(self, body: bytes) -> int:
        reader, writer = await self._connection()
        head = f"POST /predict HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/octet-stream\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        await reader.readexactly(int(answer.split("content-length:", 1)[1].split("\r\n", 1)[0]))
        if "connection: close" in answer:
            writer.close()
        else:
            self._idle.append((reader, writer))
        return int(answer.split(" ", 2)[1])

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof():  # the server may have closed it meanwhile
                return reader, writer
            writer.close()
        return await asyncio.open_connection(self._host, int(self._port))

    def close(self) -> None:
        for _, writer in self._idle:
            writer.close()


async def closed_loop(
    address: str, bodies: Sequence[bytes], *, clients: int, seconds: float = math.inf, requests: float = math.inf
) -> Load:
    """So many clients, each of which asks again as soon as it is answered: how much a server can do.

    It ends after so many seconds or requests, whichever is first.
    """
    load, connections, asked = Load(), _Connections(address), 0

    async def client(number: int) -> None:
        nonlocal asked
        while (begin := time.perf_counter()) < load.start + seconds and asked < requests:
            asked += 1
            await connections.ask(load, bodies[number % len(bodies)], begin)

    return await _ended(load, connections, map(client, range(clients)))


async def open_loop(address: str, bodies: Sequence[bytes], *, rate: float, seconds: float, seed: int = 0) -> Load:
    """Requests at random times, so many a second on the average, whether or not those before have been answered.

    A wait begins when the request was due: what makes the sender late is not left out.
    """
    load, connections, draws, asking = Load(), _Connections(address), random.Random(seed), set()
    due = load.start
    while (due := due + draws.expovariate(rate)) < load.start + seconds:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        asking.add(asyncio.create_task(connections.ask(load, bodies[len(asking) % len(bodies)], due)))
    return await _ended(load, connections, asking)


async def _ended(load: Load, connections: _Connections, asking: Iterable[Awaitable]) -> Load:
    await asyncio.gather(*asking)
    load.seconds = time.perf_counter() - load.start
    connections.close()
    return load
