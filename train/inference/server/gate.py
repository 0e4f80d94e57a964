"""What every request passes: its id, the token, how an error is told, the counters and the log."""

import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute
from starlette.types import Message, Receive, Scope, Send

from convert.files import shown
from train.inference.server.limits import Refusal
from train.inference.server.metrics import Metrics

_log = logging.getLogger(__name__)
_ID = re.compile(r"[\w.:-]{1,64}", re.ASCII)
_SHOWN = 200  # characters of a path, to who asked and in the log
GONE = 499  # the status, in log and counters, of a request that was abandoned


class Gate:
    """Wraps the application.

    Args:
        token: that requests have to bear, but for those to `open_paths`; none: all may ask.
        log: takes one line of JSON for each request, but for those to `quiet_paths`: probes come every few seconds.
    """

    def __init__(
        self,
        app: Starlette,
        *,
        metrics: Metrics,
        token: str | None,
        open_paths: frozenset[str],
        quiet_paths: frozenset[str],
        log: Callable[[str], None] | None,
    ):
        self._app, self._metrics, self._log = app, metrics, log
        self._token = None if token is None else token.encode()
        self._open_paths, self._quiet_paths = open_paths, quiet_paths

    @property
    def routes(self) -> list[BaseRoute]:
        return self._app.routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        wished = headers.get("x-request-id", "")
        request_id = wished if _ID.fullmatch(wished) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        start, status = time.monotonic(), 500

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
                MutableHeaders(scope=message)["X-Content-Type-Options"] = "nosniff"
            await send(message)

        try:
            if scope["path"] in self._open_paths or self._may_ask(headers):
                await self._app(scope, receive, send_named)
            else:
                refusal = Refusal(401, "a bearer token is needed", {"WWW-Authenticate": "Bearer"})
                await told(refusal, request_id)(scope, receive, send_named)
        except Exception:  # a fault of ours; `tell_failure` has answered
            _log.exception("request %s failed", request_id)
        finally:
            self._note(scope, request_id, status, time.monotonic() - start)

    def _may_ask(self, headers: Headers) -> bool:
        if self._token is None:
            return True
        scheme, _, token = headers.get("authorization", "").partition(" ")
        # in constant time: how long it takes tells nothing about the token
        return scheme.lower() == "bearer" and hmac.compare_digest(token.strip().encode("latin-1"), self._token)

    def _note(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        # never the path: anybody could make up many
        name = getattr(scope.get("endpoint"), "__name__", "none")
        self._metrics.count(name, status, seconds)
        if self._log is not None and scope["path"] not in self._quiet_paths:
            entry = {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "request_id": request_id,
                "client": (scope.get("client") or ("",))[0],
                "method": scope["method"],
                "path": scope["path"][:_SHOWN],  # without the query, and never with anything of the body
                "status": status,
                "seconds": round(seconds, 4),
                **({"pictures": scope["state"]["pictures"]} if "pictures" in scope["state"] else {}),
            }
            self._log(json.dumps(entry))


def told(refusal: Refusal, request_id: str) -> Response:
    """A refusal as JSON: `error`, as the Open Inference Protocol has it too, and the request's id."""
    content = {"error": refusal.message, "request_id": request_id}
    return JSONResponse(content, refusal.status, refusal.headers)


async def tell_refusal(request: Any, error: Exception) -> Response:
    """Answers Refusal, and what Starlette raises for unknown paths and wrong methods."""
    if isinstance(error, HTTPException):
        path, method = shown(request.scope["path"][:_SHOWN]), request.method
        why = {404: f"there is no {path}", 405: f"{path} does not take {method}"}
        error = Refusal(error.status_code, why.get(error.status_code, error.detail), error.headers)
    assert isinstance(error, Refusal)
    return told(error, request.state.request_id)


async def tell_failure(request: Any, error: Exception) -> Response:
    """Answers whatever else is raised: a fault of ours, which the log explains and the answer does not."""
    return told(Refusal(500, "the server failed; its log tells why"), request.state.request_id)
