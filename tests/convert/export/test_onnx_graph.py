"""ONNX files: they compute what their source does, say what they are, and are not kept otherwise."""

import contextlib
import importlib.metadata
import importlib.util
import io
import json
import os
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import convert.export.onnx_graph
from convert import ConversionError, load_weights, save
from convert.__main__ import main
from convert.export.compare import photographs
from convert.export.export import export
from convert.formats.write import write
from convert.models import torch_model
from crossvit_jax.preprocess import MEAN, STD
from crossvit_torch import create_model
from tests.convert.conftest import CLASS_NAMES, perturb
from tests.convert.export.test_stablehlo import code_block, run_without_this_library
from tests.convert.tensorrt import unsupported

LICENSES = {"float32": "Apache-2.0", "float16": "CC BY-NC 4.0"}  # the first is the default


@pytest.fixture(scope="session", params=["float32", "float16"])
def exported(request, small, tmp_path_factory):
    """(dtype, path, standard output) of the command."""
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        licence = ["--license", LICENSES["float16"]] if request.param == "float16" else []
        assert main([str(small), str(path), "--dtype", request.param, *licence]) == 0
    assert err.getvalue() == ""
    return request.param, path, out.getvalue()


def test_logits_are_the_twins_for_any_batch(exported, small):
    dtype, path, _ = exported
    weights = load_weights(small)
    session = onnxruntime.InferenceSession(path)
    for batch in (1, 3):
        images = torch.from_numpy(photographs(weights.config, batch)).permute(0, 3, 1, 2).contiguous()
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        with torch.inference_mode():
            expected = torch_model(weights)(images).numpy()
        assert logits.shape == (batch, 5)
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, expected, atol={"float32": 1e-5, "float16": 0.01}[dtype] * expected.max())


def test_a_model_with_fewer_tokens_computes_so_in_the_file_too(small, tmp_path):
    path = tmp_path / "reduced.onnx"
    assert main([str(small), str(path), "--reduce-tokens=merge:4,1"]) == 0
    images = np.random.default_rng(0).standard_normal((3, 3, 48, 48), np.float32)
    (logits,) = onnxruntime.InferenceSession(path).run(["logits"], {"images": images})
    with torch.inference_mode():
        expected, whole = (
            torch_model(load_weights(small, reduce_tokens=reduction))(torch.tensor(images)).numpy()
            for reduction in ("merge:4,1", "none")
        )
    scale = np.abs(expected).max()
    assert np.abs(logits - expected).max() <= 1e-5 * scale, np.abs(logits - expected).max() / scale
    assert np.abs(logits - whole).max() > 1e-4 * scale, np.abs(logits - whole).max() / scale


def test_the_command_tells_how_far_the_file_is_from_its_source(exported):
    dtype, path, out = exported
    assert f"written     {path}, {path.stat().st_size:,} bytes\n" in out
    difference = float(out.split("differ from the source's by ")[1].split()[0])
    assert 0 < difference < {"float32": 1e-5, "float16": 0.01}[dtype]
    assert "top-1 agreement 100.0%" in out
    assert ("float16 (stored as float32)" in out) == (dtype == "float16")


def test_the_file_says_what_it_is(exported):
    dtype, path, _ = exported
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    described = {entry.key: entry.value for entry in model.metadata_props}
    assert described["variant"] == "custom"
    assert tuple(json.loads(described["class_names"])) == CLASS_NAMES
    assert json.loads(described["image_size"]) == [48, 48]
    assert json.loads(described["mean"]) == [0.485, 0.456, 0.406]
    assert json.loads(described["std"]) == [0.229, 0.224, 0.225]
    assert described["license"] == LICENSES[dtype]
    assert described["library"].startswith("crossvit-jax 0.")
    assert described["dtype"] == dtype
    (images,), (logits,) = model.graph.input, model.graph.output
    assert [d.dim_param or d.dim_value for d in images.type.tensor_type.shape.dim] == ["batch", 3, 48, 48]
    assert [d.dim_param or d.dim_value for d in logits.type.tensor_type.shape.dim] == ["batch", 5]


def test_weights_are_stored_in_the_dtype_asked_for(exported):
    dtype, path, _ = exported
    sizes = {}
    for tensor in onnx.load(path).graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        sizes[array.dtype.name] = sizes.get(array.dtype.name, 0) + array.size
    assert max(sizes, key=sizes.get) == dtype
    assert sizes[dtype] > 0.98 * sum(sizes.values())


@pytest.mark.parametrize(("image_size", "matrices"), [((240, 240), 1), ((240, 120), 2)])
def test_a_square_image_is_resized_by_one_matrix_and_a_rectangle_by_two(tmp_path, image_size, matrices):
    model = perturb(create_model("ti", image_size=image_size, num_classes=5, stages=1, depth=(1, 1)))
    weights = load_weights(save(model.state_dict(), model.config, tmp_path / "w.safetensors"), image_size=image_size)
    path, (comparison,) = export(weights, tmp_path / "model.onnx")
    assert 0 < comparison.largest < 1e-5
    small = [tuple(sorted((size * 14 // 15, size), reverse=True)) for size in image_size]
    graph = onnx.load(path)
    shapes = [tuple(sorted(tensor.dims, reverse=True)) for tensor in graph.graph.initializer]
    assert sum(shape in small for shape in shapes) == matrices
    assert unsupported(graph) == []


def test_nothing_of_this_machine_is_in_the_file(exported):
    _, path, _ = exported
    data = path.read_bytes()
    assert os.path.dirname(convert.export.onnx_graph.__file__).encode() not in data
    assert b"stack_trace" not in data


def test_tensorrts_parser_has_every_operator_of_the_graph(exported):
    assert unsupported(onnx.load(exported[1])) == []


def test_tensorrts_parser_has_every_operator_of_a_dagger_variant_without_a_head(tmp_path):
    settings = {"image_size": 48, "image_scale": (1.0, 2 / 3), "num_classes": 0, "stages": 1, "depth": (1, 1)}
    model = create_model("9-dagger", **settings)
    weights = load_weights(save(model.state_dict(), model.config, tmp_path / "w.safetensors"))
    graph = convert.export.onnx_graph.onnx_graph(weights)
    assert graph.graph.output[0].name == "features"
    assert unsupported(graph) == []


@pytest.mark.parametrize("exported", ["float32"], indirect=True)
def test_the_code_in_the_documentation_names_the_classes(exported, small, tmp_path):
    shutil.copy(exported[1], tmp_path / "model.onnx")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 48, 48, 3), np.uint8)
    np.save(tmp_path / "pixels.npy", pixels)
    printed = run_without_this_library(code_block("ONNX"), tmp_path)
    images = (pixels / np.float32(255) - np.float32(MEAN)) / np.float32(STD)
    best = convert.export.onnx_graph.run_torch(load_weights(small))(images).argmax(axis=1)
    assert printed == f"{[CLASS_NAMES[index] for index in best]}\n"


def _model(nodes, tensors, *, opsets=(("", 20),), inputs=()):
    helper = onnx.helper
    initializers = [onnx.numpy_helper.from_array(array, name) for name, array in tensors.items()]
    values = [helper.make_tensor_value_info(name, kind, [1]) for name, kind in inputs]
    graph = helper.make_graph(nodes, "g", values, [], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid(*opset) for opset in opsets])


def test_what_tensorrt_refuses_is_found():
    make_node = onnx.helper.make_node
    nodes = [
        make_node("Resize", ["x", "", "s"], ["a"], mode="cubic"),
        make_node("Resize", ["x", "", "s"], ["b"], mode="linear", antialias=1),
        make_node("Attention", ["x", "x", "x"], ["c"]),
        make_node("FusedMatMul", ["x", "x"], ["d"], domain="com.microsoft"),
        make_node("If", ["x"], ["e"]),
        make_node("MatMul", ["x", "x"], ["f"]),
    ]
    assert unsupported(_model(nodes, {}, opsets=[("", 23), ("com.microsoft", 1)])) == [
        "opset 23 of ai.onnx",
        "opset 1 of com.microsoft",
        "Resize with mode cubic",
        "Resize with mode linear and antialiasing",
        "operator ai.onnx.Attention",
        "operator com.microsoft.FusedMatMul",
        "operator ai.onnx.If",
    ]


@pytest.mark.parametrize(
    ("kind", "inputs", "attributes", "fault"),
    [
        ("QuantizeLinear", ["x", "s", "int8"], {}, None),
        ("QuantizeLinear", ["x", "s"], {"output_dtype": onnx.TensorProto.INT8}, None),
        ("QuantizeLinear", ["x", "s"], {}, "QuantizeLinear to uint8"),
        ("QuantizeLinear", ["x", "s", "uint8"], {}, "QuantizeLinear to uint8"),
        ("QuantizeLinear", ["x", "s", "int16"], {}, "QuantizeLinear to int16"),
        ("QuantizeLinear", ["x", "s", "three"], {}, "QuantizeLinear with a zero point other than 0"),
        ("QuantizeLinear", ["x", "s", "x"], {}, "QuantizeLinear with a zero point other than 0"),
        ("DequantizeLinear", ["int8", "s", "int8"], {}, None),
        ("DequantizeLinear", ["quantised", "s"], {}, None),
        ("DequantizeLinear", ["int32", "s"], {}, "DequantizeLinear from int32"),
        ("DequantizeLinear", ["uint8", "s", "uint8"], {}, "DequantizeLinear from uint8"),
        ("DequantizeLinear", ["int8", "s", "three"], {}, "DequantizeLinear with a zero point other than 0"),
        ("DequantizeLinear", ["x", "s"], {}, "DequantizeLinear from float"),
        ("DequantizeLinear", ["unknown", "s"], {}, "DequantizeLinear from undefined"),
    ],
)
def test_of_quantised_tensors_tensorrt_takes_int8_with_zero_points_0(kind, inputs, attributes, fault):
    tensors = {dtype: np.array(0, dtype) for dtype in ("int8", "uint8", "int16", "int32")}
    tensors |= {"three": np.array(3, np.int8), "s": np.array(0.1, np.float32)}
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["x", "s", "int8"], ["quantised"]),
        onnx.helper.make_node(kind, inputs, ["y"], **attributes),
    ]
    model = _model(nodes, tensors, inputs=[("x", onnx.TensorProto.FLOAT)])
    assert unsupported(model) == [fault] * (fault is not None)


@pytest.mark.parametrize(
    ("node", "fault"),
    [
        (("Constant", [], {"value_float": 1.5}), None),
        (("Constant", [], {"value_floats": [1.5, 2.0]}), None),
        (("Constant", [], {"value_int": 0}), None),
        (("Constant", [], {"value_ints": [0, 1]}), None),
        (("Constant", [], {"value_string": "a"}), "Constant with value_string"),
        (("Constant", [], {"value": onnx.numpy_helper.from_array(np.array(1.0))}), "tensors of float64"),
        (("Cast", ["x"], {"to": onnx.TensorProto.DOUBLE}), "tensors of float64"),
        (("Add", ["x", "half"], {}), None),
        (("Add", ["double", "double"], {}), "tensors of float64"),
    ],
)
def test_tensorrt_has_neither_strings_nor_float64(node, fault):
    kind, inputs, attributes = node
    tensors = {"double": np.array(1.0)} if "double" in inputs else {"half": np.array(1, np.float16)}
    model = _model([onnx.helper.make_node(kind, inputs, ["y"], **attributes)], tensors)
    assert unsupported(model) == [fault] * (fault is not None)


@pytest.fixture
def quick(monkeypatch, exported):
    """The exporter returns what it has returned before, for tests of what comes after it."""
    graph = onnx.load(exported[1])
    monkeypatch.setattr(convert.export.onnx_graph, "onnx_graph", lambda weights, dtype: graph)
    return graph


def _run(capsys, *args):
    status = main([str(arg) for arg in args])
    return status, *capsys.readouterr()


@pytest.mark.parametrize("exported", ["float32"], indirect=True)
def test_a_file_that_computes_something_else_is_not_kept(capsys, quick, small, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"what was there")
    bias = next(tensor for tensor in quick.graph.initializer if tensor.name.endswith("head.0.bias"))
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 10, bias.name))
    status, out, err = _run(capsys, small, path, "--overwrite")
    assert (status, err) == (1, "")
    assert f"NOT written {path}\n" in out
    assert "TOO MUCH" in out
    assert os.listdir(tmp_path) == ["model.onnx"]
    assert path.read_bytes() == b"what was there"


@pytest.mark.parametrize("exported", ["float32"], indirect=True)
def test_weights_that_are_not_finite_are_not_exported(capsys, quick, small, tmp_path):
    weights = load_weights(small)
    tensors = dict(weights.tensors) | {"head.0.bias": np.full(5, np.nan, np.float32)}
    source = save(tensors, weights.config, tmp_path / "nan.safetensors")
    status, out, err = _run(capsys, source, tmp_path / "model.onnx")
    assert status == 1
    assert err.startswith("warning: 5 of")
    assert "by nan of the largest" in out
    assert os.listdir(tmp_path) == ["nan.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x.onnx", "--dtype", "bfloat16"], "compute in float32 or float16, not in bfloat16"),
        (["x.onnx", "--verify"], "--verify is for weights"),
        (["missing/x.onnx"], "the folder missing does not exist"),
        (["~nobody-of-this-name/x.onnx"], "~nobody-of-this-name is nobody's home folder"),
        (["x.stablehlo", "--license", "MIT"], "--license is for .onnx, .pt and .hf"),
        (["x.safetensors", "--license", "MIT"], "--license is for .onnx, .pt and .hf"),
        (["there.onnx/"], "there.onnx exists; --overwrite"),
        (["there.onnx"], "exists; --overwrite"),
        (["folder.onnx", "--overwrite"], "is a folder, and is not replaced"),
        (
            ["x.tflite"],
            "unknown ending '.tflite'; known: .flax.safetensors, .safetensors, .pth, .hf, .onnx, .stablehlo",
        ),
    ],
)
def test_refusals_come_before_the_source_is_read(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.onnx").touch()
    (tmp_path / "folder.onnx").mkdir()
    status, out, err = _run(capsys, "no-such-source.pth", *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["folder.onnx", "there.onnx"]


def test_a_folder_that_cannot_be_written_to_is_told_before_the_source_is_read(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write anywhere
    for name in ("x.onnx", "x.stablehlo", "x.safetensors"):
        status, _, err = _run(capsys, "no-such-source.pth", tmp_path / name)
        assert status == 2
        assert f"{name}: the folder {tmp_path} cannot be written to" in err


def test_a_library_that_is_not_installed_has_no_version(weights, monkeypatch):
    def fail(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", fail)
    assert convert.metadata.summary(weights)["library"] == "crossvit-jax unknown"


def test_without_the_extra_its_name_is_told(capsys, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *args: None if name == "onnxscript" else find_spec(name, *args)
    )
    status, _, err = _run(capsys, "no-such-source.pth", tmp_path / "x.onnx")
    assert status == 2
    assert "needs onnxscript: pip install -e '.[onnx]'" in err


def test_save_keeps_to_weights(small, tmp_path):
    with pytest.raises(ConversionError, match="holds no weights to load again; python -m convert exports it"):
        write(load_weights(small), tmp_path / "x.onnx")


def test_a_failing_exporter_leaves_nothing(small, tmp_path, monkeypatch):
    def fail(weights, dtype):
        raise RuntimeError("no translation\nof something")

    monkeypatch.setattr(convert.export.onnx_graph, "onnx_graph", fail)
    with pytest.raises(ConversionError, match=r"x\.onnx could not be written: no translation$"):
        export(load_weights(small), tmp_path / "x.onnx")
    assert os.listdir(tmp_path) == []
