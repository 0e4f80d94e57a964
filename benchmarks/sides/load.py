"""Load for a server: HTTP requests over connections that stay open, from one thread. Imports nothing of jax."""

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_LONGEST_WAIT = 60.0  # seconds for an answer


@dataclass
class Load:
    """What came of some load."""

    seconds: float = 0.0  # from its begin to the last answer
    statuses: Counter = field(default_factory=Counter)  # 0: there was no answer
    waits: list[float] = field(default_factory=list)  # seconds of those answered with 200, from when they were due

    def quantile(self, share: float) -> float | None:
        """Of the waits; none where nothing was answered."""
        waits = sorted(self.waits)
        return waits[min(len(waits) - 1, int(share * len(waits)))] if waits else None

    @property
    def rate(self) -> float:
        """Answers with 200 in a second."""
        return len(self.waits) / self.seconds

    def as_json(self) -> dict[str, Any]:
        """Its figures."""
        asked = sum(self.statuses.values())
        return {
            "asked": asked,
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "answered_per_s": self.rate,
            "rejected": (asked - self.statuses[200]) / asked if asked else 0.0,
            "p50_s": self.quantile(0.5),
            "p99_s": self.quantile(0.99),
        }


class Connections:
    """Sends bodies to one path of a server; connections are opened as they are needed, and used again."""

    def __init__(self, address: str, path: str = "/predict"):
        self._host, port = address.rsplit(":", 1)
        self._port, self._path = int(port), path
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self, body: bytes, content_type: str = "application/octet-stream") -> int:
        """The status of the answer; 0: there was none."""
        try:
            async with asyncio.timeout(_LONGEST_WAIT):
                reader, writer = (
                    self._idle.pop() if self._idle else await asyncio.open_connection(self._host, self._port)
                )
                head = f"POST {self._path} HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: {content_type}\r\n"
                writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                answer = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
                length = int(answer.split("content-length:", 1)[1].split("\r\n", 1)[0])
                await reader.readexactly(length)
        except (OSError, EOFError, TimeoutError, asyncio.IncompleteReadError):
            return 0
        if "connection: close" in answer:
            writer.close()
        else:
            self._idle.append((reader, writer))
        return int(answer.split(" ", 2)[1])

    def close(self) -> None:
        for _, writer in self._idle:
            writer.close()


async def closed_loop(
    address: str, bodies: Sequence[bytes], *, clients: int, seconds: float = math.inf, requests: float = math.inf
) -> Load:
    """So many clients, each of which asks again as soon as it is answered: how much a server can do.

    Args:
        seconds, requests: the first of which that is reached ends it.
    """
    connections, load, start, asked = Connections(address), Load(), time.perf_counter(), 0

    async def client(number: int) -> None:
        nonlocal asked
        while (begin := time.perf_counter()) < start + seconds and asked < requests:
            asked += 1
            _count(load, await connections.ask(bodies[number % len(bodies)]), begin)

    await asyncio.gather(*map(client, range(clients)))
    load.seconds = time.perf_counter() - start
    connections.close()
    return load


async def open_loop(address: str, bodies: Sequence[bytes], *, rate: float, seconds: float, seed: int = 0) -> Load:
    """Requests at random times, so many a second on the average, whether or not those before have been answered.

    A wait begins when the request was due: what makes the sender late is not left out.
    """
    connections, load, draws = Connections(address), Load(), random.Random(seed)
    asking, start = set(), time.perf_counter()
    due = start
    while (due := due + draws.expovariate(rate)) < start + seconds:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))

        async def ask(due: float, body: bytes) -> None:
            _count(load, await connections.ask(body), due)

        task = asyncio.create_task(ask(due, bodies[len(asking) % len(bodies)]))
        asking.add(task)
    await asyncio.gather(*asking)
    load.seconds = time.perf_counter() - start
    connections.close()
    return load


def _count(load: Load, status: int, begin: float) -> None:
    load.statuses[status] += 1
    if status == 200:
        load.waits.append(time.perf_counter() - begin)
