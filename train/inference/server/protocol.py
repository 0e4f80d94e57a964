"""The Open Inference Protocol, version 2, over HTTP: what Triton's and KServe's clients speak.

Of its extensions there is the one for binary tensors, which these clients use unless they are told not to: behind the
JSON, whose length a header tells, come the tensors' bytes. The same tensors are in a model repository for Triton, see
`convert.export.triton`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from convert import metadata
from convert.export.triton import INPUT, MODEL, VERSION
from train.inference.server.answers import Tensor
from train.inference.server.bodies import decoded_base64, parsed_json
from train.inference.server.limits import Refusal

_LARGEST = 2**31 - 1  # number of pictures, rows or columns
JSON_LENGTH = "Inference-Header-Content-Length"


class Inference(NamedTuple):
    """What `infer` is to answer."""

    id: str | None
    pictures: Sequence[bytes] | np.ndarray  # encoded; or uint8 RGB (pictures, height, width, 3)
    outputs: dict[str, bool]  # the names of those that are wanted, and whether as bytes


def server_metadata() -> dict[str, Any]:
    """What the server is."""
    return {"name": "crossvit-jax", "version": metadata.version("crossvit-jax"), "extensions": ["binary_tensor_data"]}


def model_metadata(platform: str, outputs: Sequence[Tensor]) -> dict[str, Any]:
    """What the model takes and returns. Pictures are uint8 RGB of any size, or (BYTES, of shape [n]) encoded files."""
    return {
        "name": MODEL,
        "versions": [VERSION],
        "platform": platform,
        "inputs": [{"name": INPUT, "datatype": "UINT8", "shape": [-1, -1, -1, 3]}],
        "outputs": [{**one._asdict(), "shape": list(one.shape)} for one in outputs],
    }


def check_model(name: str, version: str | None = None) -> None:
    """Raises Refusal for any other than the one model and its one version."""
    if name != MODEL or version not in (None, VERSION):
        asked = name if version is None else f"{name}, version {version}"
        raise Refusal(404, f"there is no model {asked[:80]!r}; there is {MODEL!r}, version {VERSION}")


def read_inference(body: bytes, known: Sequence[Tensor], json_length: str | None) -> Inference:
    """What a request asks for.

    Args:
        known: the outputs that there are.
        json_length: the header that tells where the JSON ends and bytes begin; none: there are none.

    Raises Refusal.
    """
    if json_length is None:
        length = len(body)
    elif json_length.isascii() and json_length.isdigit() and int(json_length[:20]) <= len(body):
        length = int(json_length)
    else:
        raise Refusal(400, f"{JSON_LENGTH} must be a number of bytes that the body has")
    asked = _object(parsed_json(body[:length]), "the request")
    name = asked.get("id")
    if name is not None and not isinstance(name, str):
        raise Refusal(400, "id must be a string")
    inputs = asked.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or _object(inputs[0], "an input").get("name") != INPUT:
        raise Refusal(400, f"inputs must be an array of one, named {INPUT!r}")
    pictures = _pictures(inputs[0], body[length:])
    return Inference(name, pictures, _outputs(asked, [one.name for one in known]))


def answer(
    inference: Inference, known: Sequence[Tensor], rows: Sequence[Sequence[np.ndarray]]
) -> tuple[bytes, dict[str, str]]:
    """The body of a response, and its headers.

    Args:
        rows: for each picture, the arrays of the outputs that there are, little-endian.
    """
    tensors = {one.name: (one.datatype, column) for one, column in zip(known, zip(*rows, strict=True), strict=True)}
    outputs, binary = [], []
    for name, as_bytes in inference.outputs.items():
        datatype, column = tensors[name]
        tensor = np.stack(column)
        output: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(tensor.shape)}
        if as_bytes:
            output["parameters"] = {"binary_data_size": tensor.nbytes}
            binary.append(tensor.tobytes())
        else:
            output["data"] = tensor.ravel().tolist()
        outputs.append(output)
    told: dict[str, Any] = {"model_name": MODEL, "model_version": VERSION, "outputs": outputs}
    text = json.dumps(told if inference.id is None else {"id": inference.id} | told).encode()
    if not binary:
        return text, {"Content-Type": "application/json"}
    return b"".join([text, *binary]), {"Content-Type": "application/octet-stream", JSON_LENGTH: str(len(text))}


def _pictures(asked: Mapping[str, Any], binary: bytes) -> Sequence[bytes] | np.ndarray:
    shape, datatype, parameters = asked.get("shape"), asked.get("datatype"), _parameters(asked)
    if not isinstance(shape, list) or not all(type(size) is int and 0 < size <= _LARGEST for size in shape):
        raise Refusal(400, f"shape must be an array of whole numbers from 1 to {_LARGEST}")
    if (datatype, len(shape)) not in (("UINT8", 4), ("BYTES", 1)) or (datatype == "UINT8" and shape[3] != 3):
        raise Refusal(400, f"{INPUT} are UINT8 [n, height, width, 3], or encoded as BYTES [n]")
    if "binary_data_size" in parameters:
        if "data" in asked or parameters["binary_data_size"] != len(binary):
            raise Refusal(400, f"behind the JSON are {len(binary)} bytes, which binary_data_size must tell; no data")
        return _bytes_of(binary, shape[0]) if datatype == "BYTES" else _pixels_of(binary, shape)
    if binary or "data" not in asked:
        raise Refusal(400, f"{INPUT} have neither data nor a binary_data_size")
    if datatype == "UINT8":
        return _pixels_in_json(asked["data"], shape)
    texts = asked["data"]
    if not isinstance(texts, list) or len(texts) != shape[0]:
        raise Refusal(400, f"data must be an array of {shape[0]} strings in base64")
    return [decoded_base64(text, f"picture {place}") for place, text in enumerate(texts, start=1)]


def _pixels_of(binary: bytes, shape: Sequence[int]) -> np.ndarray:
    if len(binary) != math.prod(shape):
        raise Refusal(400, f"the shape has {math.prod(shape)} bytes, and there are {len(binary)}")
    return np.frombuffer(binary, np.uint8).reshape(shape).copy()  # the compiled resize takes no read-only memory


def _pixels_in_json(data: Any, shape: Sequence[int]) -> np.ndarray:
    try:
        values = np.array(data)
        fits = values.dtype.kind == "i" and values.size == math.prod(shape) and 0 <= values.min() <= values.max() < 256
    except (ValueError, OverflowError, TypeError):  # ragged, or beyond any integer
        fits = False
    if not fits:
        raise Refusal(400, f"data must be {math.prod(shape)} whole numbers from 0 to 255")
    return values.astype(np.uint8).reshape(shape)


def _bytes_of(binary: bytes, count: int) -> list[bytes]:
    """Elements of BYTES: each behind its length, in 4 bytes, the lowest first."""
    found, place = [], 0
    while place + 4 <= len(binary) and len(found) < count:
        end = place + 4 + int.from_bytes(binary[place : place + 4], "little")
        found.append(binary[place + 4 : end])
        place = end
    if len(found) != count or place != len(binary):
        raise Refusal(400, f"the bytes are not {count} pictures, each behind its length in 4 bytes")
    return found


def _outputs(asked: Mapping[str, Any], known: Sequence[str]) -> dict[str, bool]:
    """The names of those that are wanted (none named: all), and whether as bytes."""
    all_binary = _parameters(asked).get("binary_data_output", False)
    outputs = asked.get("outputs") or [{"name": name} for name in known]
    if not isinstance(outputs, list):
        raise Refusal(400, "outputs must be an array")
    wanted = {}
    for output in outputs:
        name = _object(output, "an output").get("name")
        if name not in known or name in wanted:
            raise Refusal(400, f"the outputs are {' and '.join(map(repr, known))}, each once")
        wanted[name] = _parameters(output).get("binary_data", all_binary) is True
    return wanted


def _parameters(asked: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters = _object(asked.get("parameters", {}), "parameters")
    for name in ("shared_memory_region", "classification"):
        if name in parameters:
            raise Refusal(400, f"this server does not have Triton's extension for {name}")
    return parameters


def _object(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise Refusal(400, f"{what} must be an object")
    return value
