"""The routes of the server, and a request's way through it."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from train.inference.server import protocol
from train.inference.server.answers import answers_of
from train.inference.server.batcher import Batcher
from train.inference.server.bodies import read_asked, read_body
from train.inference.server.engines.engine import Engine
from train.inference.server.gate import GONE, Gate, tell_failure, tell_refusal
from train.inference.server.limits import Admission, Limits, Refusal
from train.inference.server.metrics import CONTENT_TYPE, Metrics
from train.inference.server.page import openapi, page, told_attention
from train.inference.server.pictures import Picture, Pictures

_T = TypeVar("_T")
Answer = Callable[[Request, bytes, "Room"], Coroutine[Any, Any, Response]]

_PROBES = frozenset({"/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"})
_OPEN = frozenset({"/", "/openapi.json"})  # files that are the same for everybody; the page asks for a token


class Room:
    """What a request takes of the server: at first that of one picture."""

    def __init__(self, request: Request, admission: Admission):
        self._state, self._admission, self._pictures = request.state, admission, 1
        admission.take(1)

    def resize(self, pictures: int) -> None:
        """To what the request turned out to have. Raises Refusal."""
        self._state.pictures = pictures  # for the log
        self._admission.leave(self._pictures)
        self._pictures = 0
        self._admission.take(pictures)
        self._pictures = pictures

    def leave(self) -> None:
        self._admission.leave(self._pictures)


class Service:
    """An engine with all that is around it. It takes pictures once `start` has made its programs."""

    def __init__(self, engine: Engine, limits: Limits):
        self.engine, self.limits = engine, limits
        self.metrics = Metrics(engine.sizes)
        self.admission = Admission(limits)
        self.batcher = Batcher(engine, limits.batching_delay, self.admission, self.metrics)
        self.pictures = Pictures(engine.transform, limits, self.metrics)
        self.answers = answers_of(engine)
        # while a batch is computed there are the outputs of one before it: of segmenters they may be a gigabyte
        self._room_for_outputs = asyncio.Semaphore(2 * engine.sizes[-1])
        self.starting, self.ending = True, False
        self.metrics.held.set_function(lambda: self.admission.taken)
        self.metrics.ready.set_function(lambda: self.is_ready)

    @property
    def is_ready(self) -> bool:
        return not (self.starting or self.ending)

    async def start(self) -> None:
        """Compiles, and is ready. Raises whatever compiling does."""
        await asyncio.gather(self.batcher.compile(), self.pictures.prepare())
        self.starting = False

    async def answered(self, request: Request, answer: Answer) -> Response:
        """The answer to a request that carries pictures, within the limits. Raises Refusal."""
        if not self.is_ready:
            why = "is ending" if self.ending else "is not ready yet"
            raise Refusal(503, f"the server {why}", {"Retry-After": "1", "Connection": "close"})
        room = Room(request, self.admission)
        end = time.monotonic() + self.limits.deadline
        try:
            try:
                async with asyncio.timeout_at(asyncio.get_running_loop().time() + self.limits.deadline):
                    body = await read_body(request, self.limits)
            except TimeoutError:
                why = f"the request was not read within {self.limits.deadline:g} s"
                raise Refusal(408, why, {"Connection": "close"}) from None
            return await self._unless_gone(request, answer(request, body, room), end - time.monotonic())
        finally:
            room.leave()

    async def computed(self, pictures: list[Picture], tell: Callable[[Any, Picture], _T]) -> list[_T]:
        """What `tell` makes of each picture and the engine's output for it, computed in whatever batches."""
        return await asyncio.gather(*(self._computed(picture, tell) for picture in pictures))

    async def _computed(self, picture: Picture, tell: Callable[[Any, Picture], _T]) -> _T:
        if not self.answers.takes_long:
            return tell(await self.batcher.ask(picture.image), picture)
        async with self._room_for_outputs:
            row = await self.batcher.ask(picture.image)
            return await self.pictures.run(tell, row, picture)

    async def _unless_gone(self, request: Request, answer: Awaitable[Response], seconds: float) -> Response:
        """The answer, if it is there in time and somebody still waits for it; otherwise it leaves all queues."""
        answering, leaving = asyncio.ensure_future(answer), asyncio.ensure_future(_abandoned(request))
        try:
            await asyncio.wait({answering, leaving}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                return answering.result()
            if leaving.done():
                return Response(status_code=GONE)
            raise Refusal(504, f"there was no answer within {self.limits.deadline:g} s")
        finally:
            for task in (answering, leaving):
                task.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)


async def _abandoned(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def make_app(service: Service, *, log: Callable[[str], None] | None = None) -> Gate:
    """The application of a service, which it runs while it lives.

    Args:
        log: takes one line of JSON for each request; none: nothing is logged.
    """
    endpoints = _Endpoints(service)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        computing = asyncio.create_task(service.batcher.run())
        yield
        computing.cancel()

    app = Starlette(
        routes=endpoints.routes(),
        lifespan=lifespan,
        exception_handlers={Refusal: tell_refusal, HTTPException: tell_refusal, Exception: tell_failure},
    )
    app.router.redirect_slashes = False
    return Gate(
        app,
        metrics=service.metrics,
        token=service.limits.token,
        open_paths=_OPEN | _PROBES,
        quiet_paths=_PROBES,
        log=log,
    )


class _Endpoints:
    def __init__(self, service: Service):
        self._service = service

    def routes(self) -> list[Route]:
        return [
            Route("/", self.page),
            Route("/openapi.json", self.openapi),
            Route("/predict", self.predict, methods=["POST"]),
            Route("/healthz", self.healthz),
            Route("/readyz", self.readyz),
            Route("/metrics", self.metrics),
            Route("/v2", self.server_metadata),
            Route("/v2/health/live", self.live),
            Route("/v2/health/ready", self.ready),
            *(
                Route(f"/v2/models/{{name}}{number}{what}", endpoint, methods=methods)
                for number in ("", "/versions/{version}")
                for what, endpoint, methods in (
                    ("", self.model_metadata, ["GET"]),
                    ("/ready", self.model_ready, ["GET"]),
                    ("/infer", self.infer, ["POST"]),
                )
            ),
        ]

    async def page(self, request: Request) -> Response:
        text, headers = page(self._service.engine)
        return HTMLResponse(text, headers=headers)

    async def openapi(self, request: Request) -> Response:
        return Response(openapi(), media_type="application/json")

    async def healthz(self, request: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def readyz(self, request: Request) -> Response:
        service = self._service
        status = "ready" if service.is_ready else "ending" if service.ending else "starting"
        return JSONResponse({"status": status}, 200 if service.is_ready else 503)

    async def metrics(self, request: Request) -> Response:
        return Response(self._service.metrics.text(), media_type=CONTENT_TYPE)

    # --- the Open Inference Protocol ---

    async def server_metadata(self, request: Request) -> Response:
        return JSONResponse(protocol.server_metadata())

    async def live(self, request: Request) -> Response:
        return JSONResponse({"live": True})

    async def ready(self, request: Request) -> Response:
        ready = self._service.is_ready
        return JSONResponse({"ready": ready}, 200 if ready else 503)

    async def model_metadata(self, request: Request) -> Response:
        protocol.check_model(**request.path_params)
        return JSONResponse(protocol.model_metadata(self._service.engine.platform, self._service.answers.outputs))

    async def model_ready(self, request: Request) -> Response:
        protocol.check_model(**request.path_params)
        ready = self._service.is_ready
        return JSONResponse({"name": protocol.MODEL, "ready": ready}, 200 if ready else 503)

    async def infer(self, request: Request) -> Response:
        protocol.check_model(**request.path_params)
        return await self._service.answered(request, self._inferred)

    async def _inferred(self, request: Request, body: bytes, room: Room) -> Response:
        service, length = self._service, request.headers.get(protocol.JSON_LENGTH)
        read, answers = service.pictures, service.answers
        asked = await read.run(protocol.read_inference, body, answers.outputs, length)
        room.resize(len(asked.pictures))
        encoded = isinstance(asked.pictures, list)
        pictures = await (read.of_files if encoded else read.of_pixels)(asked.pictures)
        answers.check(pictures)
        rows = await service.computed(pictures, answers.tensors)
        content, headers = await read.run(protocol.answer, asked, answers.outputs, rows)
        return Response(content, headers=headers)

    # --- our own ---

    async def predict(self, request: Request) -> Response:
        return await self._service.answered(request, self._predicted)

    async def _predicted(self, request: Request, body: bytes, room: Room) -> Response:
        service, content_type = self._service, request.headers.get("content-type", "")
        asked = await read_asked(content_type, request.query_params, body, service.answers.options)
        if asked.attention and not service.engine.explains:
            raise Refusal(400, "this model does not tell what it attends to")
        if (asked.attention or asked.overlay) and len(asked.pictures) > 1:
            what = "attention is told" if asked.attention else "overlay is drawn"
            raise Refusal(400, f"{what} for one picture at a time")
        room.resize(len(asked.pictures))
        pictures = await service.pictures.of_files(asked.pictures, keep_pixels=asked.overlay)
        if asked.attention:
            explained = await service.batcher.ask(pictures[0].image, explain=True)
            told = service.answers.told(explained.probabilities, pictures[0], asked)
            run, config = service.pictures.run, service.engine.config
            attention = await run(told_attention, config, pictures[0].image, explained)
            return JSONResponse({"results": [told | {"attention": attention}]})
        results = await service.computed(pictures, partial(service.answers.told, asked=asked))
        return JSONResponse({"results": results})
