"""Puts pictures that came at about the same time into one batch."""

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from train.inference.server.engines.engine import Engine
from train.inference.server.limits import Admission
from train.inference.server.metrics import Metrics

_log = logging.getLogger(__name__)
_WEIGHT = 0.2  # of the newest batch in what a picture takes


@dataclass(frozen=True, eq=False)
class _Waiting:
    image: np.ndarray  # (height, width, 3), uint8, as the model sees it
    explain: bool
    answer: asyncio.Future
    since: float  # by time.monotonic()


class Batcher:
    """The queue before an engine. One thread computes, batch after batch; what comes meanwhile is the next batch.

    A picture waits at most `delay` seconds for others while the engine is idle. An answer that is cancelled, as nobody
    waits for it any more, leaves the queue.
    """

    def __init__(self, engine: Engine, delay: float, admission: Admission, metrics: Metrics):
        self._engine, self._delay, self._admission, self._metrics = engine, delay, admission, metrics
        self._queue: dict[asyncio.Future, _Waiting] = {}  # in the order in which they came
        self._came = asyncio.Event()
        self._device = ThreadPoolExecutor(1, "engine")  # jax would block the event loop
        metrics.queue.set_function(lambda: self.waiting)

    @property
    def waiting(self) -> int:
        """Images in the queue."""
        return len(self._queue)

    def ask(self, image: np.ndarray, *, explain: bool = False) -> "asyncio.Future[Any]":
        """A future: of what `Engine.compute` returns of the image, or `Engine.explain`."""
        answer = asyncio.get_running_loop().create_future()
        self._queue[answer] = _Waiting(image, explain, answer, time.monotonic())
        answer.add_done_callback(lambda done: self._queue.pop(done, None))
        self._came.set()
        return answer

    async def compile(self) -> None:
        """Makes the engine ready."""
        await asyncio.get_running_loop().run_in_executor(self._device, self._engine.compile)

    async def run(self) -> None:
        """Computes until it is cancelled."""
        while True:
            batch = await self._next_batch()
            for waiting in batch:
                del self._queue[waiting.answer]
            await self._answer(batch)

    async def _next_batch(self) -> Sequence[_Waiting]:
        while True:
            while not self._queue:
                self._came.clear()
                await self._came.wait()
            batch = self._head()
            if not batch:
                await asyncio.sleep(0)  # those that were cancelled leave
                continue
            left = batch[0].since + self._delay - time.monotonic()
            if batch[0].explain or len(batch) == self._engine.sizes[-1] or left <= 0:
                return batch
            self._came.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._came.wait()

    def _head(self) -> list[_Waiting]:
        """The longest that have waited, as many as one program takes."""
        batch: list[_Waiting] = []
        for waiting in self._queue.values():
            if waiting.answer.done():  # cancelled just now
                continue
            if len(batch) == self._engine.sizes[-1] or (batch and (batch[0].explain or waiting.explain)):
                break
            batch.append(waiting)
        return batch

    async def _answer(self, batch: Sequence[_Waiting]) -> None:
        start = time.monotonic()
        for waiting in batch:
            self._metrics.queue_seconds.observe(start - waiting.since)
        try:
            answers = await asyncio.get_running_loop().run_in_executor(self._device, self._compute, batch)
        except Exception as error:  # of the devices, say out of memory: others may fare better
            _log.exception("a batch of %d failed", len(batch))
            answers = [error] * len(batch)
        seconds = time.monotonic() - start
        self._metrics.compute_seconds.observe(seconds)
        self._metrics.batch.observe(len(batch))
        usual = self._admission.seconds_per_picture
        self._admission.seconds_per_picture = usual + _WEIGHT * (seconds / len(batch) - usual)
        for waiting, answer in zip(batch, answers, strict=True):
            if waiting.answer.done():  # cancelled
                continue
            if isinstance(answer, Exception):
                waiting.answer.set_exception(answer)
            else:
                waiting.answer.set_result(answer)

    def _compute(self, batch: Sequence[_Waiting]) -> Sequence[Any]:
        images = np.stack([waiting.image for waiting in batch])
        return [self._engine.explain(images)] if batch[0].explain else self._engine.compute(images)
