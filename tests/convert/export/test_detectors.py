"""Exported detectors find the boxes that `detect` finds, whatever runs them, and are not kept otherwise."""

import functools
import json
import os

import jax
import jaxtyping
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import convert.export.onnx_graph
from convert import load_weights, save
from convert.export import onnx_detections
from convert.export.compare import photographs
from convert.export.kept_boxes import compare_kept, kept_of
from convert.export.onnx_detections import FOUND, RAW, with_detections
from convert.models import torch_model
from crossvit_torch import CrossViTDetector
from tests.convert.conftest import perturb, refused, run
from tests.small_model import small_detector

_exported_once = functools.cache(onnx_detections._graph)


@pytest.fixture(scope="module", autouse=True)
def shapes_are_not_checked():
    """To check broadcasting, jaxtyping asks whether the batch is 1, which torch's exporter takes for a promise."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    torch.manual_seed(0)
    model = perturb(CrossViTDetector(small_detector(strides=(6, 12))))
    path = tmp_path_factory.mktemp("detector") / "detector.safetensors"
    return save(model.state_dict(), model.config, path, class_names=("cat", "dog", "owl"))


@pytest.fixture(scope="module")
def raw(detector):
    """The graph of the raw outputs."""
    return convert.export.onnx_graph.onnx_graph(load_weights(detector))


@pytest.fixture
def quick(monkeypatch, raw):
    """The exporter returns what it has returned before."""

    def again(weights, dtype="float32"):
        copy = onnx.ModelProto()
        copy.CopyFrom(raw)
        return copy

    monkeypatch.setattr(convert.export.onnx_graph, "onnx_graph", again)
    monkeypatch.setattr(onnx_detections, "_graph", _exported_once)


def some_images(config, batch):
    """Photographs, channels first."""
    return np.ascontiguousarray(photographs(config, batch).transpose(0, 3, 1, 2))


def found_by_twin(source, images):
    return {name: x.numpy() for name, x in torch_model(load_weights(source)).detect(torch.from_numpy(images)).items()}


def test_an_onnx_file_finds_what_the_twin_finds_and_says_what_it_is(capsys, detector, quick, tmp_path):
    path = tmp_path / "detector.onnx"
    status, out, err = run(capsys, detector, path)
    assert (status, err) == (0, "")
    assert "its outputs differ from the source's by" in out and "points of the same class" in out
    kept = int(out.split("it keeps the ")[1].split()[0])
    assert kept > 50 and "that its raw outputs give\n" in out
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(path)
    for batch in (1, 3):
        images = some_images(load_weights(detector).config, batch)
        got = dict(zip(FOUND, session.run(list(FOUND), {"images": images}), strict=True))
        expected = found_by_twin(detector, images)
        assert expected["valid"].any(axis=1).all()
        for name, array in expected.items():
            assert (got[name].shape, got[name].dtype) == (array.shape, array.dtype)
            np.testing.assert_allclose(got[name], array, atol=2e-3 if name == "boxes" else 1e-5)
    told = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(told["class_names"]) == ["cat", "dog", "owl"]
    thresholds = [json.loads(told[name]) for name in ("score_threshold", "iou_threshold", "max_detections")]
    assert thresholds == [0.05, 0.6, 100]
    assert told["task"] == "detection" and "crop_pct" not in told


def test_raw_outputs_are_the_twins(capsys, detector, quick, tmp_path):
    path = tmp_path / "raw.onnx"
    status, out, err = run(capsys, detector, path, "--raw")
    assert (status, err) == (0, "") and "keeps" not in out
    assert float(out.split("differ from the source's by ")[1].split()[0]) < 1e-5
    graph = onnx.load(path)
    assert [output.name for output in graph.graph.output] == list(RAW)


def test_in_int8_the_products_of_the_body_are_rounded_and_the_boxes_are_those_of_its_outputs(
    capsys, detector, quick, tmp_path
):
    path = tmp_path / "int8.onnx"
    status, out, err = run(capsys, detector, path, "--quantize", "dynamic")
    assert (status, err) == (0, "")
    assert "of their spread (bound 0.12)" in out and "that its raw outputs give" in out
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert kinds.count("MatMulInteger") > 8 and kinds.count("NonMaxSuppression") == 1


def test_a_stablehlo_program_finds_what_the_twin_finds(capsys, detector, tmp_path):
    path = tmp_path / "detector.stablehlo"
    status, out, err = run(capsys, detector, path)
    assert (status, err) == (0, "")
    assert "that its raw outputs give" in out
    images = some_images(load_weights(detector).config, 3)
    program = jax.export.deserialize(bytearray(path.read_bytes()))
    got = jax.tree.map(np.asarray, jax.jit(program.call)(images.transpose(0, 2, 3, 1)))
    for name, array in found_by_twin(detector, images).items():
        assert (got[name].shape, got[name].dtype) == (array.shape, array.dtype)
        np.testing.assert_allclose(got[name], array, atol=2e-3 if name == "boxes" else 1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"image_size": 96, "strides": (6, 12), "num_classes": 6},  # more candidates than are taken of a level
        {"image_size": 48, "strides": (12,), "num_classes": 2},  # fewer places than detections
    ],
)
def test_suppression_is_that_of_detect_with_equal_scores_and_crowded_boxes(settings):
    config = small_detector(**settings)
    points = sum(rows * columns for rows, columns in config.level_grids)
    info = onnx.helper.make_tensor_value_info
    widths = dict(zip(RAW, (config.num_classes, 4, 1), strict=True))
    values = [info(name, onnx.TensorProto.FLOAT, ["batch", points, width]) for name, width in widths.items()]
    nothing = onnx.helper.make_model(
        onnx.helper.make_graph([], "raw", values, values), opset_imports=[onnx.helper.make_opsetid("", 20)]
    )
    nothing.ir_version = 10
    session = onnxruntime.InferenceSession(with_detections(nothing, config).SerializeToString())
    rng = np.random.default_rng(0)
    for batch in (1, 4):
        outputs = {name: rng.normal(-0.5, 1.5, (batch, points, width)) for name, width in widths.items()}
        outputs["bbox_regression"] = np.abs(outputs["bbox_regression"]) * 2
        outputs = {name: array.round(1).astype(np.float32) for name, array in outputs.items()}  # many are equal
        got = dict(zip(FOUND, session.run(list(FOUND), outputs), strict=True))
        expected = kept_of(outputs, config)
        assert expected["valid"].sum() > 10 * batch
        for name in ("labels", "valid"):
            np.testing.assert_array_equal(got[name], expected[name])
        for name in ("boxes", "scores"):
            np.testing.assert_allclose(got[name], expected[name], atol=1e-5)


# --- which differences rounding may make ---


def _found(*rows):
    """One image's detections of (score, label, x1, y1, x2, y2)."""
    table = np.array(rows, np.float64).reshape(-1, 6)
    found = {"scores": table[:, 0], "labels": table[:, 1].astype(np.int32), "boxes": table[:, 2:]}
    return {name: array[None] for name, array in found.items()} | {"valid": np.ones((1, len(table)), bool)}


_FIRST, _SECOND = (0.9, 0, 0, 0, 10, 10), (0.5, 1, 20, 20, 40, 40)


@pytest.mark.parametrize(
    ("got", "near", "apart"),
    [
        ([_SECOND, _FIRST], 0, 0),
        ([_FIRST], 0, 1),
        ([_FIRST, (0.5, 2, 20, 20, 40, 40)], 0, 2),  # another class
        ([_FIRST, (0.49, 1, 20, 20, 40, 40)], 2, 0),  # the better of two that overlap: either hides the other
        ([_FIRST, (0.5, 1, 20, 20, 40, 41)], 2, 0),
        ([_FIRST, (0.5, 1, 21, 20, 41, 60)], 0, 2),
        ([_FIRST, _SECOND, (0.05005, 0, 30, 0, 40, 9)], 1, 0),  # at the threshold of scores
        ([_FIRST, _SECOND, (0.06, 0, 30, 0, 40, 9)], 0, 1),
        ([_FIRST, _SECOND, (0.3, 0, 0, 0, 10, 6)], 1, 0),  # an overlap of exactly 0.6
        ([_FIRST, _SECOND, (0.3, 0, 0, 0, 10, 7)], 0, 1),
    ],
)
def test_only_what_is_near_a_threshold_may_be_kept_by_one_alone(got, near, apart):
    compared = compare_kept(_found(*got), _found(_FIRST, _SECOND), small_detector(), "the images")
    assert (compared.near, compared.apart, compared.passed) == (near, apart, apart == 0)


def test_a_file_that_keeps_other_boxes_is_not_kept(capsys, detector, quick, tmp_path, monkeypatch):
    def lower(model, config):
        model = with_detections(model, config)
        for node in model.graph.node:
            if node.op_type == "NonMaxSuppression":
                model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32([0.3]), "lower"))
                node.input[3] = "lower"
        return model

    monkeypatch.setattr("convert.export.onnx_detections.with_detections", lower)
    status, out, err = run(capsys, detector, tmp_path / "x.onnx")
    assert (status, err) == (1, "")
    assert "are kept by one of the two alone: TOO MANY" in out and "NOT written" in out
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x.pt", "--quantize", "int8"], ".pt files are of classifiers, and these are weights for detection"),
        (["x.onnx", "--quantize", "static", "--calibrate", "digits"], "--quantize dynamic needs no images"),
        (["x.onnx", "--preprocess"], "--preprocess cuts pictures as for classifiers, and detection sees them whole"),
    ],
)
def test_what_is_for_classifiers_is_refused_before_the_work(
    capsys, detector, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.setattr(convert.export.onnx_graph, "onnx_graph", None)
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, detector, *arguments)
    assert os.listdir(tmp_path) == []


def test_raw_outputs_of_a_classifier_are_refused(capsys, small, tmp_path):
    said = refused(capsys, small, tmp_path / "x.onnx", "--raw")
    assert "--raw is for detectors, and these are weights for classification" in said
