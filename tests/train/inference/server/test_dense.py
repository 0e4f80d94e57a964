"""Detectors and segmenters: the answers of train.predict, in pixels of the picture that was sent."""

import base64
import io
import json
import shutil

import numpy as np
import pytest
import tritonclient.http
from flax import nnx
from PIL import Image

import convert
from convert import metadata
from convert.errors import SettingsError
from crossvit_jax.detection import CrossViTDetector
from crossvit_jax.segmentation import CrossViTSegmenter
from tests.small_model import small_detector, small_segmenter
from tests.train.inference.server.conftest import encoded
from train.inference.model import load_predictor
from train.inference.server.app import Service
from train.inference.server.engines.jax_engine import JaxEngine
from train.inference.server.engines.onnx_engine import OnnxEngine
from train.inference.server.limits import Limits
from train.predict import main as predict_main

_KINDS = {
    "detection": (CrossViTDetector, small_detector(), "abc"),
    "segmentation": (CrossViTSegmenter, small_segmenter(), "abcd"),
}
_SIZES = ((90, 60), (50, 70))  # width and height


class _Served:
    """Weights, the engine of them, picture files, and what train.predict says of these."""

    def __init__(self, kind, folder):
        module, config, names = _KINDS[kind]
        self.kind, self.weights = kind, folder / "w.safetensors"
        model = module(config, rngs=nnx.Rngs(0))
        convert.save(nnx.to_pure_dict(nnx.state(model, nnx.Param)), config, self.weights, class_names=tuple(names))
        # of weights that learned nothing, most boxes have a score near 0.07
        settings = {"score_threshold": 0.01, "max_detections": 20} if kind == "detection" else {}
        predictor = load_predictor(str(self.weights), precision="float32", **settings)
        self.engine = JaxEngine(predictor, 2, explains=True)
        self.engine.compile()
        self.engine.compile = lambda: None
        self.files = [folder / f"{number}.png" for number in range(len(_SIZES))]
        for number, (path, size) in enumerate(zip(self.files, _SIZES, strict=True)):
            path.write_bytes(encoded(size, seed=number))
        self.predicted = None  # until it is asked for
        self.masks, self.overlays = folder / "masks", folder / "overlays"
        self.flags = [f"--weights={self.weights}", "--precision=float32", "--format=jsonl", "--batch-size=2"]
        self.flags += [f"--overlay={self.overlays}"]
        self.flags += ["--score-threshold=0.01", "--max-detections=20"] if settings else [f"--masks={self.masks}"]


@pytest.fixture(scope="module", params=sorted(_KINDS))
def served(request, tmp_path_factory):
    return _Served(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def predicted(served, capsys):
    if served.predicted is None:
        assert predict_main([*served.flags, *map(str, served.files)]) == 0
        served.predicted = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return served.predicted


def _same(result, expected, size):
    assert result["size"] == [size[1], size[0]]
    if "classes" in expected:
        assert [one["class"] for one in result["classes"]] == [one["class"] for one in expected["classes"]]
        shares = [[one["share"] for one in some["classes"]] for some in (result, expected)]
        np.testing.assert_allclose(*shares, atol=2e-3)  # single pixels between two classes
        return
    assert len(result["objects"]) == len(expected["objects"]) > 0
    for one, other in zip(result["objects"], expected["objects"], strict=True):
        assert (one["class"], one["index"]) == (other["class"], other["index"])
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)
        np.testing.assert_allclose(one["box"], other["box"], atol=1e-2)


def test_pictures_get_the_commands_answers_alone_and_together(served, predicted, serving):
    client = serving(served.engine, batching_delay=0.05)
    contents = [path.read_bytes() for path in served.files]
    for content, expected, size in zip(contents, predicted, _SIZES, strict=True):
        (result,) = client.post("/predict", content=content).json()["results"]
        assert result.keys() == {"size", "objects" if served.kind == "detection" else "classes"}
        _same(result, expected, size)
    together = client.post("/predict", files=[("a", one) for one in contents]).json()["results"]
    for result, expected, size in zip(together, predicted, _SIZES, strict=True):
        _same(result, expected, size)


def _pixels(text):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def test_masks_and_pictures_are_those_that_the_command_writes(served, predicted, serving):
    client = serving(served.engine)
    for path, expected in zip(served.files, predicted, strict=True):
        query = "overlay=true" + ("&mask=true" if served.kind == "segmentation" else "")
        (result,) = client.post(f"/predict?{query}", content=path.read_bytes()).json()["results"]
        for key in ("picture", *(("mask",) if served.kind == "segmentation" else ())):
            written = np.asarray(Image.open(expected[key]))
            told = _pixels(result[key])
            assert told.shape == written.shape
            assert np.mean(told != written) < 2e-3


def test_the_page_asks_for_the_picture_and_options_of_others_are_refused(served, serving):
    client, picture = serving(served.engine), served.files[0].read_bytes()
    assert 'data-query="overlay=true"' in client.get("/").text
    for query in ("top_k=3", "attention=true", *(() if served.kind == "segmentation" else ("mask=true",))):
        answer = client.post(f"/predict?{query}", content=picture)
        assert answer.status_code == 400
        assert query.partition("=")[0] in answer.json()["error"]
    answer = client.post("/predict?overlay=true", files=[("a", picture)] * 2)
    assert (answer.status_code, answer.json()["error"]) == (400, "overlay is drawn for one picture at a time")
    assert client.service.admission.taken == 0


def test_large_pictures_are_drawn_smaller(served, serving):
    content = encoded((1700, 30))
    (result,) = serving(served.engine).post("/predict?overlay=true", content=content).json()["results"]
    assert result["size"] == [30, 1700]
    assert _pixels(result["picture"]).shape == (15, 850, 3)


def test_tritons_client_gets_tensors(served, predicted, listening):
    contents = [path.read_bytes() for path in served.files]
    with (
        listening(Service(served.engine, Limits(pictures=8))) as address,
        tritonclient.http.InferenceServerClient(address) as client,
    ):
        outputs = client.get_model_metadata("crossvit")["outputs"]
        alone = []
        for content in contents:
            given = tritonclient.http.InferInput("pictures", [1], "BYTES")
            given.set_data_from_numpy(np.array([content], object))
            alone.append(client.infer("crossvit", [given]))
        both = tritonclient.http.InferInput("pictures", [2], "BYTES")
        both.set_data_from_numpy(np.array(contents, object))
        if served.kind == "segmentation":
            assert outputs == [{"name": "segments", "datatype": "UINT8", "shape": [-1, -1, -1]}]
            for told, size in zip(alone, _SIZES, strict=True):
                assert told.as_numpy("segments").shape == (1, size[1], size[0])
            with pytest.raises(tritonclient.utils.InferenceServerException, match="of one size"):
                client.infer("crossvit", [both])
            return
        assert [one["name"] for one in outputs] == ["boxes", "scores", "labels", "valid"]
        told = client.infer("crossvit", [both])
        assert told.as_numpy("boxes").shape == (2, 20, 4)
        for place, expected in enumerate(predicted):
            count = len(expected["objects"])
            valid = told.as_numpy("valid")[place]
            assert valid.tolist() == [True] * count + [False] * (20 - count)
            for name, key, bound in (("boxes", "box", 1e-2), ("scores", "score", 1e-5), ("labels", "index", 0)):
                right = [one[key] for one in expected["objects"]]
                np.testing.assert_allclose(told.as_numpy(name)[place][valid], right, atol=bound)


def _onnx_file(kind, path):
    """A file with the inputs, outputs and metadata of an exported model, that computes next to nothing: there is a box
    of class 2 in the upper left quarter; a pixel is of class 3 where it is bright."""
    from onnx import TensorProto, helper, numpy_helper

    config = _KINDS[kind][1]
    fixed = {}
    if kind == "segmentation":
        kernel = np.zeros((4, 3, 1, 1), np.float32)
        kernel[3] = 1
        fixed["kernel"] = kernel
        nodes = [helper.make_node("Conv", ["images", "kernel"], ["logits"])]
        outputs = [("logits", TensorProto.FLOAT, ["batch", 4, 48, 48])]
    else:
        fixed = {
            "box": np.array([[[0, 0, 24, 24], [0, 0, 0, 0]]], np.float32),
            "score": np.array([[0.75, 0]], np.float32),
            "label": np.array([[2, 0]], np.int32),
            "is": np.array([[True, False]]),
            "one": np.array([1], np.int64),
        }
        nodes = [
            helper.make_node("Shape", ["images"], ["count"], start=0, end=1),
            helper.make_node("Concat", ["count", "one"], ["shape2"], axis=0),
            helper.make_node("Concat", ["count", "one", "one"], ["shape3"], axis=0),
            helper.make_node("Expand", ["box", "shape3"], ["boxes"]),
            helper.make_node("Expand", ["score", "shape2"], ["scores"]),
            helper.make_node("Expand", ["label", "shape2"], ["labels"]),
            helper.make_node("Expand", ["is", "shape2"], ["valid"]),
        ]
        kinds = {"boxes": TensorProto.FLOAT, "scores": TensorProto.FLOAT}
        kinds |= {"labels": TensorProto.INT32, "valid": TensorProto.BOOL}
        outputs = [(name, dtype, ["batch", 2, *([4] if name == "boxes" else [])]) for name, dtype in kinds.items()]
    graph = helper.make_graph(
        nodes,
        "model",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 48, 48])],
        [helper.make_tensor_value_info(*one) for one in outputs],
        [numpy_helper.from_array(array, name) for name, array in fixed.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    about = metadata.describe(config, tuple(_KINDS[kind][2]))
    helper.set_model_props(model, {metadata.KEY: json.dumps(about), "dtype": "float32"})
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize("kind", sorted(_KINDS))
def test_exported_files_answer_in_pixels_of_the_picture(kind, serving, tmp_path):
    _onnx_file(kind, tmp_path / "w.onnx")
    engine = OnnxEngine(tmp_path / "w.onnx", 2)
    assert {"detection": "detector", "segmentation": "segmenter"}[kind] in engine.headline
    pixels = np.zeros((60, 90, 3), np.uint8)
    pixels[:, :30] = 255  # a third of it
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    (result,) = serving(engine).post("/predict", content=file.getvalue()).json()["results"]
    if kind == "detection":
        box = {"class": "c", "index": 2, "score": 0.75, "box": [0, 0, 45, 45]}
        assert result == {"size": [60, 90], "objects": [box]}
    else:
        assert [one["class"] for one in result["classes"]] == ["a", "d"]
        assert result["classes"][1]["share"] == pytest.approx(1 / 3, abs=0.02)
    with pytest.raises(SettingsError, match="crop-pct"):
        OnnxEngine(tmp_path / "w.onnx", 2, crop_pct=0.5)


@pytest.mark.slow
def test_a_browser_shows_the_picture_with_what_is_found(served, browser, listening, tmp_path):
    shutil.copy(served.files[0], tmp_path / "picture.png")
    with listening(Service(served.engine, Limits(pictures=4))) as address:
        browser.get(f"http://{address}/")
        browser.find_element("id", "file").send_keys(str(tmp_path / "picture.png"))
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(browser, 60, poll_frequency=0.02).until(
            lambda page: page.find_element("id", "overlay").is_displayed()
        )
        width = browser.execute_script("return document.getElementById('overlay').naturalWidth")
        rows = browser.find_elements("css selector", "#classes tr")
        assert (width, len(rows) > 0) == (90, True)
        assert not browser.find_element("id", "attention").is_displayed()
