"""The Open Inference Protocol, as Triton's own client speaks it, and what is refused of it."""

import base64
import io
import json

import numpy as np
import pytest
import tritonclient.http
from PIL import Image
from tritonclient.utils import InferenceServerException

from tests.train.inference.server.conftest import ToldEngine, encoded

_INFER = "/v2/models/crossvit/infer"
_PICTURES = [encoded((70, 50), seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def triton(address):
    """Triton's own client."""
    with tritonclient.http.InferenceServerClient(address) as client:
        yield client


def _expected(engine, pictures):
    images = [engine.transform({"image": one, "label": 0, "name": ""})["image"] for one in pictures]
    return engine.compute(np.stack(images))


def test_health_and_metadata(triton):
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready("crossvit")
    assert triton.is_model_ready("crossvit", "1")
    assert not triton.is_model_ready("other")
    assert triton.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    told = triton.get_model_metadata("crossvit", "1")
    assert told == triton.get_model_metadata("crossvit")
    assert [one["name"] for one in (*told["inputs"], *told["outputs"])] == ["pictures", "probabilities", "classes"]
    assert told["outputs"][0] == {"name": "probabilities", "datatype": "FP32", "shape": [-1, 8]}


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("kind", ["BYTES", "UINT8"])
def test_pictures_get_the_models_probabilities_by_tritons_client(triton, small_engine, kind, binary):
    if kind == "UINT8":
        array = np.stack([np.asarray(Image.open(io.BytesIO(one))) for one in _PICTURES])
        given = tritonclient.http.InferInput("pictures", list(array.shape), kind)
    else:
        texts = [one if binary else base64.b64encode(one) for one in _PICTURES]
        array = np.array(texts, object)
        given = tritonclient.http.InferInput("pictures", [3], kind)
    given.set_data_from_numpy(array, binary_data=binary)
    wanted = [tritonclient.http.InferRequestedOutput(name, binary_data=binary) for name in ("classes", "probabilities")]
    expected = _expected(small_engine, _PICTURES)
    for outputs in (wanted, wanted[1:], None):
        told = triton.infer("crossvit", [given], outputs=outputs, request_id="one", model_version="1")
        assert told.get_response()["id"] == "one"
        np.testing.assert_allclose(told.as_numpy("probabilities"), expected, atol=1e-5)
        if outputs is not wanted[1:] and len(outputs or wanted) == 2:
            np.testing.assert_array_equal(told.as_numpy("classes"), np.argsort(-expected, kind="stable"))
        else:
            assert told.as_numpy("classes") is None


def test_refusals_reach_tritons_client(triton):
    given = tritonclient.http.InferInput("pictures", [1], "BYTES")
    given.set_data_from_numpy(np.array([b"no picture"], object))
    with pytest.raises(InferenceServerException, match="in none of the formats"):
        triton.infer("crossvit", [given])
    with pytest.raises(InferenceServerException, match="there is no model 'resnet'"):
        triton.infer("resnet", [given])


def _input(**changes):
    asked = {"name": "pictures", "shape": [1, 2, 2, 3], "datatype": "UINT8", "data": [0] * 12}
    return {key: value for key, value in (asked | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ([], "must be an object"),
        ({"inputs": []}, "array of one"),
        ({"inputs": [1]}, "must be an object"),
        ({"inputs": [_input()] * 2}, "array of one"),
        ({"inputs": [_input(name="images")]}, "named 'pictures'"),
        ({"inputs": [_input(shape=[1, 2, 2, 4])]}, "UINT8 [n, height, width, 3]"),
        ({"inputs": [_input(shape=[0, 2, 2, 3])]}, "from 1 to 2147483647"),
        ({"inputs": [_input(shape=[10**4200, 2, 2, 3])]}, "from 1 to 2147483647"),
        ({"inputs": [_input(shape="1")]}, "whole numbers"),
        ({"inputs": [_input(datatype="FP32")]}, "UINT8 [n, height, width, 3]"),
        ({"inputs": [_input(data=[0] * 11)]}, "12 whole numbers"),
        ({"inputs": [_input(data=[0] * 11 + [256])]}, "from 0 to 255"),
        ({"inputs": [_input(data=[0] * 11 + [0.5])]}, "from 0 to 255"),
        ({"inputs": [_input(data=[[0], [1, 2]])]}, "from 0 to 255"),
        ({"inputs": [_input(data=[10**30] * 12)]}, "from 0 to 255"),
        ({"inputs": [_input(data="x")]}, "from 0 to 255"),
        ({"inputs": [_input(data=None)]}, "neither data nor"),
        ({"inputs": [_input(shape=[2], datatype="BYTES", data=["AA=="])]}, "array of 2 strings"),
        ({"inputs": [_input(shape=[1], datatype="BYTES", data=["%"])]}, "base64"),
        ({"inputs": [_input(parameters={"shared_memory_region": "x"})]}, "shared_memory_region"),
        ({"inputs": [_input(parameters={"binary_data_size": 12})]}, "0 bytes, which binary_data_size must tell"),
        ({"inputs": [_input()], "outputs": [{"name": "logits"}]}, "'probabilities' and 'classes'"),
        ({"inputs": [_input()], "outputs": "x"}, "must be an array"),
        ({"inputs": [_input()], "id": 3}, "id must be a string"),
    ],
)
def test_a_mistake_in_a_request_is_told(serving, asked, words):
    answer = serving(ToldEngine()).post(_INFER, json=asked)
    assert answer.status_code == 400
    assert words in answer.json()["error"]


@pytest.mark.parametrize(
    ("length", "shape", "datatype", "binary", "words"),
    [
        ("x", [1], "BYTES", b"", "Inference-Header-Content-Length"),
        ("100000", [1], "BYTES", b"", "Inference-Header-Content-Length"),
        (None, [1], "BYTES", b"\5\0\0\0abc", "the bytes are not 1 pictures"),
        (None, [2], "BYTES", b"\1\0\0\0a", "the bytes are not 2 pictures"),
        (None, [1], "BYTES", b"\1\0\0\0ab", "the bytes are not 1 pictures"),
        (None, [1, 1, 1, 3], "UINT8", b"ab", "the shape has 3 bytes, and there are 2"),
        (None, [10**9, 10**9, 1, 3], "UINT8", b"ab", "and there are 2"),
    ],
)
def test_bytes_that_do_not_fit_are_told(serving, length, shape, datatype, binary, words):
    asked = _input(shape=shape, datatype=datatype, data=None, parameters={"binary_data_size": len(binary)})
    text = json.dumps({"inputs": [asked]}).encode()
    headers = {"Inference-Header-Content-Length": length or str(len(text))}
    answer = serving(ToldEngine()).post(_INFER, content=text + binary, headers=headers)
    assert answer.status_code == 400
    assert words in answer.json()["error"]


def test_the_limits_hold_here_too(serving):
    client = serving(ToldEngine(), pictures=2, pixels=5)
    assert client.post(_INFER, json={"inputs": [_input()]}).status_code == 200
    many = _input(shape=[3, 1, 1, 3], data=[0] * 9)
    large = _input(shape=[1, 2, 3, 3], data=[0] * 18)
    for asked, words in ((many, "at most 2 can be"), (large, "a picture has 3 x 2 pixels; at most 5")):
        answer = client.post(_INFER, json={"inputs": [asked]})
        assert answer.status_code == 413
        assert words in answer.json()["error"]
    assert client.get("/v2/models/crossvit/versions/2").status_code == 404
    assert client.get(_INFER).status_code == 405
    client.service.ending = True
    for path in ("/v2/health/ready", "/v2/models/crossvit/ready"):
        assert client.get(path).status_code == 503
    assert client.get("/v2/health/live").status_code == 200
