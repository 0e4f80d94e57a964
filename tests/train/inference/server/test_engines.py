"""What else computes for the server: bfloat16, integers, ONNX files. Each answers alike in whatever batch."""

from pathlib import Path

import numpy as np
import pytest

import convert
from convert.errors import SettingsError
from convert.export.onnx_graph import onnx_graph
from convert.export.onnx_int8 import quantize_dynamic
from tests.command_line import refusal
from tests.train.inference.server.conftest import encoded
from train.inference.model import load_classifier
from train.inference.server.engines.jax_engine import JaxEngine
from train.inference.server.engines.onnx_engine import OnnxEngine
from train.serve import main


@pytest.fixture(scope="module")
def images(small_engine):
    pictures = [encoded((70 + 9 * seed, 60), seed=seed) for seed in range(3)]
    return np.stack([small_engine.transform({"image": one, "label": 0, "name": ""})["image"] for one in pictures])


@pytest.fixture(scope="module")
def onnx_file(small_weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "w.onnx"
    path.write_bytes(onnx_graph(convert.load_weights(small_weights)).SerializeToString())
    return path


def _alone(engine, images):
    return np.concatenate([engine.compute(one[None]) for one in images])


@pytest.mark.parametrize(("how", "bound"), [({"precision": "bfloat16"}, 2e-2), ({"quantize": "int8"}, 0.1)])
def test_other_arithmetic_comes_near_and_neighbours_change_nothing(small_weights, small_engine, images, how, bound):
    engine = JaxEngine(load_classifier(small_weights, **{"precision": "float32"} | how), 2, explains=False)
    engine.compile()
    together = engine.compute(images[:2])
    np.testing.assert_allclose(together, small_engine.compute(images[:2]), atol=bound)
    np.testing.assert_allclose(engine.compute(images[[0, 2]])[0], together[0], atol=1e-6)
    # in a program of another size, sums have another order, and values are rounded to the other side here and there
    np.testing.assert_allclose(together, _alone(engine, images[:2]), atol=2e-2)


def test_an_onnx_file_has_the_answers_of_its_source(onnx_file, small_engine, images):
    engine = OnnxEngine(onnx_file, 4)
    engine.compile()
    assert (engine.sizes, tuple(engine.class_names)) == ((1, 2, 4), tuple("abcdefgh"))
    assert "in float32 by ONNX Runtime" in engine.headline
    expected = small_engine.compute(images)
    np.testing.assert_allclose(engine.compute(images), expected, atol=1e-5)
    np.testing.assert_allclose(_alone(engine, images), expected, atol=1e-5)
    assert engine.transform == small_engine.transform


def test_a_dynamically_quantised_file_gets_one_picture_at_a_time(onnx_file, small_engine, images, serving, tmp_path):
    quantize_dynamic(onnx_file, tmp_path / "int8.onnx")
    engine = OnnxEngine(tmp_path / "int8.onnx", 8)
    assert engine.sizes == (1,)
    expected = _alone(engine, images)
    assert np.abs(expected - small_engine.compute(images)).max() < 0.1
    client = serving(engine, batching_delay=0.02)
    files = [("a", encoded((70 + 9 * seed, 60), seed=seed)) for seed in range(3)]
    results = client.post("/predict?top_k=8", files=files).json()["results"]
    for result, row in zip(results, expected, strict=True):
        told = {one["index"]: one["probability"] for one in result["predictions"]}
        np.testing.assert_allclose([told[index] for index in range(8)], row, atol=1e-6)
    refused = client.post("/predict?attention=true", content=files[0][1])
    assert (refused.status_code, refused.json()["error"]) == (400, "this model does not tell what it attends to")
    assert client.get("/v2/models/crossvit").json()["platform"] == "onnxruntime_onnx"


def test_what_is_no_file_of_ours_is_refused(onnx_file, tmp_path, capsys):
    import onnx

    program = "python -m train.serve"
    told = refusal(capsys, program, main, f"--weights={onnx_file}", "--port=0", "--precision=bfloat16")
    assert "computes as it was exported: leave out --precision" in told
    assert "does not exist" in refusal(capsys, program, main, f"--weights={tmp_path}/no.onnx", "--port=0")
    for content, words in ((b"noise", "cannot be read"), (_without_description(onnx.load(onnx_file)), "what it is")):
        (tmp_path / "odd.onnx").write_bytes(content)
        with pytest.raises(SettingsError, match=words):
            OnnxEngine(Path(tmp_path / "odd.onnx"), 1)


def _without_description(model):
    del model.metadata_props[:]
    return model.SerializeToString()
