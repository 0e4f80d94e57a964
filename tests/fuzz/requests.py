"""Damaged and hostile requests to a server that listens in the process that serves the inputs."""

import base64
import functools
import json
import random
import socket
import threading
import time
from pathlib import Path
from typing import Any

import uvicorn

from tests.fuzz.damage import VALUES, damaged_bytes, damaged_json
from tests.train.inference.server.conftest import ToldEngine
from train.inference.server.app import Service, make_app
from train.inference.server.limits import Limits
from train.inference.server.protocol import JSON_LENGTH
from train.inference.server.run import Connection

_INFER = "/v2/models/crossvit/infer"
_ODD = ["", "-1", "+5", "1e3", "0x10", "5, 6", "\xb2", "chunked", "gzip, chunked", "identity", "9" * 20, "9" * 5000]
_ODD += ["multipart/form-data; boundary=\xff", "multipart/form-data; boundary=b; charset=idna", "a" * 70_000, "a\0b"]
_ODD += [value for value in VALUES if isinstance(value, str) and value.isascii() and "\n" not in value]
_NAMES = ["Content-Length", "Content-Type", "Transfer-Encoding", "Content-Encoding", "Expect", "Host", "X-Request-ID"]
_NAMES += [JSON_LENGTH, "Upgrade", "Connection", "Authorization"]
_SECONDS = 20  # in which every request is answered, or its connection closed


@functools.cache
def _server() -> tuple[int, Service]:
    """The port of a server that begins at the first request, and its service."""
    limits = Limits(pictures=8, body_bytes=500_000, pixels=100_000, deadline=8, batching_delay=0)
    service = Service(ToldEngine(), limits)
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(make_app(service), http=Connection, log_config=None, lifespan="on", timeout_keep_alive=1)
    server = uvicorn.Server(config)
    threading.Thread(target=server.run, args=([listener],), daemon=True).start()
    while not server.started:
        time.sleep(0.001)
    service.starting = False
    return listener.getsockname()[1], service


def _json_of(kind: str, picture: bytes) -> dict[str, Any]:
    text = base64.b64encode(picture).decode()
    if kind == "json":
        return {"pictures": [text, text], "top_k": 1}
    tensor: dict[str, Any] = {"name": "pictures", "shape": [1, 2, 2, 3], "datatype": "UINT8"}
    if kind == "tensor":
        tensor["parameters"] = {"binary_data_size": 12}
    else:
        tensor["data"] = list(range(12))
    return {"id": "a", "inputs": [tensor], "outputs": [{"name": "classes", "parameters": {"binary_data": True}}]}


def _made(chance: random.Random, picture: bytes) -> tuple[bytes, bool]:
    """The message, and whether all of it is there that its head tells of."""
    kind = chance.choice(["raw", "form", "json", "numbers", "tensor"])
    path, headers, damage = (
        "/predict?top_k=1",
        {"Host": "x", "Connection": "close"},
        chance.choice(["json", "body", "header", "message"]),
    )
    if kind == "raw":
        body = picture
    elif kind == "form":
        part = b'--b\r\nContent-Disposition: form-data; name="a"; filename="a.png"\r\n\r\n%b\r\n'
        body = 2 * (part % picture) + b"--b--\r\n"
        headers["Content-Type"] = "multipart/form-data; boundary=b"
    else:
        asked = _json_of(kind, picture)
        body = damaged_json(chance, asked) if damage == "json" else json.dumps(asked).encode()
        headers["Content-Type"] = "application/json"
        path = path if kind == "json" else _INFER
    if kind == "tensor":
        headers[JSON_LENGTH] = str(len(body))
        body += bytes(range(12))
    if damage == "body" or (damage == "json" and kind in ("raw", "form")):
        body = damaged_bytes(chance, body)
    headers["Content-Length"] = str(len(body))
    if damage == "header":
        headers[chance.choice(_NAMES)] = chance.choice(_ODD)
        if chance.random() < 0.3:
            path = chance.choice(
                ["/%00", "/%ff", "/\x7f", "*", "/predict?%ed%a0%80=1", "/v2/models/%1b%0a", "/" + "a" * 50_000]
            )
    head = f"POST {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    message = head.encode("latin-1", "replace") + b"\r\n" + body
    return (damaged_bytes(chance, message), False) if damage == "message" else (message, damage != "header")


def _asked(port: int, message: bytes, *, whole: bool = True) -> bytes:
    """All that the server answers; of what may not be `whole`, the end is told. Raises TimeoutError if it keeps the
    connection open."""
    with socket.create_connection(("127.0.0.1", port), timeout=_SECONDS) as client:
        answer = b""
        try:
            client.sendall(message)
            if not whole:
                client.shutdown(socket.SHUT_WR)
            while part := client.recv(2**16):
                answer += part
        except ConnectionError:  # it may close before all is sent
            pass
        return answer


def request(chance: random.Random, templates: Path, work: Path) -> int:
    port, service = _server()
    picture = (templates / f"picture.{chance.choice(['JPEG', 'PNG'])}").read_bytes()
    message, whole = _made(chance, picture)
    answer = _asked(port, message, whole=whole)
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head[9:12] or 400)  # without an answer the request was not sent to its end
    assert status in (200, 400, 404, 405, 408, 413, 415, 422), answer[:500]
    if status != 200 and b"application/json" in head:
        told = json.loads(body.partition(b"}HTTP/1.1")[0].removesuffix(b"}") + b"}")
        assert told["error"].isprintable(), told
    alive = _asked(port, b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert alive.startswith(b"HTTP/1.1 200"), alive
    end = time.monotonic() + _SECONDS
    while service.admission.taken:  # what nobody waits for leaves
        assert time.monotonic() < end, f"{service.admission.taken} pictures are held"
        time.sleep(0.001)
    return 0 if status == 200 else 2
