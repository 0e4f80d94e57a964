"""Reads what a request carries: counted bytes, and in them pictures as they are, as a form or in JSON."""

import base64
import binascii
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from python_multipart.exceptions import FormParserError
from starlette.datastructures import Headers
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from train.inference.server.limits import Limits, Refusal

TOP_K = 5
_DISCARDED = 4  # times the largest body; so much more is read, to no use, before a refusal
_RAW = ("application/octet-stream", "application/x-www-form-urlencoded")  # the latter: curl, if it is told no other


class Asked(NamedTuple):
    """What `POST /predict` is to answer."""

    pictures: list[bytes]  # encoded
    top_k: int = TOP_K  # of a classifier
    attention: bool = False  # of a classifier: what its class tokens attend to
    overlay: bool = False  # of the others: the picture with what is found in it
    mask: bool = False  # of a segmenter


async def read_body(request: Request, limits: Limits) -> bytes:
    """The whole body. Raises Refusal if it is encoded, or has more bytes than allowed whatever its header says."""
    if request.headers.get("content-encoding", "identity") != "identity":
        raise Refusal(415, "bodies are taken as they are, without Content-Encoding")
    most, parts, count = limits.body_bytes, [], 0
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > most and "expect" in request.headers:
        raise _too_large(most)  # it has not been sent yet
    with suppress(ClientDisconnect):
        async for part in request.stream():
            count += len(part)
            if count <= most:
                parts.append(part)
            elif count > _DISCARDED * most:
                break
            else:
                parts.clear()  # read to its end all the same: many clients listen only when they have sent all
        if count > most:
            raise _too_large(most)
        return b"".join(parts)
    raise Refusal(400, "the request was not sent to its end")


def _too_large(most: int) -> Refusal:
    return Refusal(413, f"the body has more than {most} bytes", {"Connection": "close"})


async def read_asked(content_type: str, query: Mapping[str, str], body: bytes, known: Sequence[str]) -> Asked:
    """What a body of this type asks for. Raises Refusal.

    Args:
        known: the fields of `Asked` beside its pictures that this model has answers to.
    """
    kind = content_type.partition(";")[0].strip().lower()
    unknown = set(query) - set(known)
    if unknown:
        raise Refusal(400, f"unknown in the query: {sorted(unknown)[0][:40]!r}; this model knows {', '.join(known)}")
    options = {name: _option(name, _typed(name, text)) for name, text in query.items()}
    if kind == "application/json":
        pictures, more = _of_json(body, known)
        options |= more
    elif kind == "multipart/form-data":
        pictures = await _of_form(content_type, body)
    elif not kind or kind in _RAW or kind.startswith("image/"):
        pictures = [body]
    else:
        raise Refusal(415, "a body is image/*, application/octet-stream, multipart/form-data or application/json")
    if not pictures:
        raise Refusal(400, "there is no picture in the request")
    return Asked(pictures, **options)


def parsed_json(body: bytes) -> Any:
    """What a JSON text says. Raises Refusal."""
    try:
        return json.loads(body)
    except RecursionError:
        raise Refusal(400, "the JSON is nested too deeply") from None
    except ValueError as error:  # also of bytes that are no text
        raise Refusal(400, f"the body is no JSON: {error}") from None


def decoded_base64(text: Any, name: str) -> bytes:
    """The bytes that a text stands for. Raises Refusal."""
    if not isinstance(text, str):
        raise Refusal(400, f"{name} must be a string in base64")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refusal(400, f"{name} is not in base64: {error}") from None


def _of_json(body: bytes, known: Sequence[str]) -> tuple[list[bytes], dict[str, Any]]:
    asked = parsed_json(body)
    keys = {"picture", "pictures", *known}
    if not isinstance(asked, dict) or set(asked) - keys or ("picture" in asked) == ("pictures" in asked):
        raise Refusal(400, f'JSON is an object with "picture" or "pictures", and may have {", ".join(known)}')
    texts = asked["pictures"] if "pictures" in asked else [asked["picture"]]
    if not isinstance(texts, list):
        raise Refusal(400, "pictures must be an array of strings in base64")
    options = {name: _option(name, asked[name]) for name in known if name in asked}
    return [decoded_base64(text, f"picture {place}") for place, text in enumerate(texts, start=1)], options


class _InMemory(MultiPartParser):
    spool_max_size = 2**62  # no picture is ever written to the disk; the body is counted already
    ended = False

    def on_end(self) -> None:
        self.ended = True


async def _of_form(content_type: str, body: bytes) -> list[bytes]:
    async def stream() -> AsyncIterator[bytes]:
        yield body
        if not parser.ended:  # which nobody else asks; raised here, the parser closes its files
            raise MultiPartException("it has no end")

    parser = _InMemory(Headers({"content-type": content_type}), stream())
    try:
        form = await parser.parse()
    except (
        MultiPartException,
        FormParserError,
        ValueError,
        LookupError,
    ) as error:  # also of unknown charsets
        message = error.message if isinstance(error, MultiPartException) else "it is damaged"
        raise Refusal(400, f"the form cannot be read: {message}") from None
    try:
        for name, part in form.multi_items():
            if isinstance(part, str):
                raise Refusal(400, f"the form has a field {name[:40]!r} that is no file; top_k goes into the query")
        return [await part.read() for _, part in form.multi_items()]
    finally:
        await form.close()


def _option(name: str, value: Any) -> int | bool:
    """The value of an option as JSON has it. Raises Refusal."""
    if name != "top_k":
        if not isinstance(value, bool):
            raise Refusal(400, f"{name} must be true or false")
    elif type(value) is not int or value < 1:
        raise Refusal(400, "top_k must be a whole number, 1 or more")
    return value


def _typed(name: str, text: str) -> str | int | bool:
    """A value in a query as JSON would have it."""
    if name != "top_k":
        return {"true": True, "1": True, "false": False, "0": False}.get(text, text)
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else text
