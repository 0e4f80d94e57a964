"""int8 files: what is quantised in them and what is not, and that they still tell the digits' images apart."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

import crossvit_torch.crossvit
from convert import ConversionError
from convert.errors import MissingExtra
from convert.export.calibration import calibration_images
from convert.export.onnx_int8 import float_products, quantize_dynamic, quantize_static
from crossvit_torch import create_model
from tests.convert.tensorrt import unsupported

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SETTINGS = {"num_classes": 10, "image_size": 48, "image_scale": (1.0, 2 / 3), "depth": (1, 2), "stages": 1}
RESIZE = ((32, 48), (48, 32))  # the shapes of the constant matrices


@pytest.fixture(scope="session")
def images():
    """Real ones, normalised; the first half to calibrate with, the others to compare on."""
    images = calibration_images("digits", create_model("ti", **SETTINGS).config, 128)
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Path:
    """A model of one stage, with a head that is large enough for the classes to lie apart."""
    torch.manual_seed(0)
    model = create_model("ti", **SETTINGS).eval()
    with torch.no_grad():
        for head in model.head:
            head.weight.mul_(50)
    to_32 = functional.interpolate(torch.eye(48)[None, None], (32, 48), mode="bicubic", align_corners=False)[0, 0]

    def resize(x, size, crop_scale):
        return x if tuple(x.shape[2:]) == size else to_32 @ x @ to_32.T

    path = tmp_path_factory.mktemp("onnx") / "float.onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crossvit_torch.crossvit, "scale_image", resize)
        program = torch.onnx.export(
            model,
            (torch.zeros(2, 3, 48, 48),),
            dynamo=True,
            opset_version=20,
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            verbose=False,
        )
    program.save(path)
    return path


@pytest.fixture(scope="session")
def dynamic(exported, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "dynamic.onnx"
    quantize_dynamic(exported, path)
    return path


@pytest.fixture(scope="session")
def static(exported, images, tmp_path_factory) -> dict[str, Path]:
    """By target."""
    folder = tmp_path_factory.mktemp("onnx")
    for target in ("cpu", "tensorrt"):
        quantize_static(exported, folder / target, images[:64], target=target)
    return {target: folder / target for target in ("cpu", "tensorrt")}


@pytest.fixture(params=["dynamic", "cpu", "tensorrt"])
def quantised(request, dynamic, static) -> Path:
    return {"dynamic": dynamic, **static}[request.param]


def logits(path: Path, images: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    if path.name == "tensorrt":  # to the letter: not every CPU has the int8 arithmetic for it
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images})[0]


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def producers(path: Path) -> dict:
    return {name: node for node in onnx.load(path).graph.node for name in node.output}


def test_the_logits_stay_within_the_bound_and_the_classes_with_them(exported, quantised, images):
    expected, got = logits(exported, images[64:]), logits(quantised, images[64:])
    assert got.dtype == np.float32
    assert np.sqrt(np.mean((got - expected) ** 2)) <= 0.12 * expected.std()
    assert np.mean(got.argmax(1) == expected.argmax(1)) >= 0.8
    assert not np.array_equal(got, expected)


def test_the_layers_weights_are_int8_and_the_file_is_small(exported, quantised):
    weights = [array for array in tensors(quantised).values() if array.dtype == np.int8 and array.ndim == 2]
    floats = [array for array in tensors(exported).values() if array.ndim == 2 and array.shape not in RESIZE]
    assert Counter(tuple(sorted(array.shape)) for array in weights) == Counter(
        tuple(sorted(array.shape))
        for array in floats  # head weights may be transposed
    )
    assert quantised.stat().st_size < exported.stat().st_size / 2.5  # a whole model's: / 3.4


def test_every_output_channel_has_a_scale_of_its_own(quantised):
    scales = [array for name, array in tensors(quantised).items() if name.endswith("_scale") and array.size > 1]
    assert len(scales) >= 14
    assert all(np.unique(scale).size > scale.size / 2 for scale in scales)


def test_the_resize_matrices_and_the_products_of_activations_stay_float(exported, quantised):
    stay = set(float_products(onnx.load(exported)))
    made_by = producers(quantised)
    products = {node.name: node for node in made_by.values() if node.name in stay}
    # two of the resize, and of each attention's scores and weighted values: 3 self-attentions, 2 cross-attentions
    assert len(stay) == len(products) == 2 + 2 * 5
    for node in products.values():
        assert node.op_type == "MatMul"
        rounded = [made_by[name] for name in node.input if name in made_by and "Quant" in made_by[name].op_type]
        # the image, 8 bits from the start, is the one exception: as it also goes into the first convolution
        assert all(made_by[dequantise.input[0]].input[0] == "images" for dequantise in rounded)
    matrices = [array for array in tensors(quantised).values() if array.shape in RESIZE]
    assert matrices and all(array.dtype == np.float32 for array in matrices)


def test_static_ranges_come_from_the_images(exported, static, images, tmp_path):
    quantize_static(exported, tmp_path / "again.onnx", images[:64])
    quantize_static(exported, tmp_path / "darker.onnx", images[:64] * 0.5)
    expected = logits(static["cpu"], images[64:])
    assert np.array_equal(logits(tmp_path / "again.onnx", images[64:]), expected)
    assert not np.array_equal(logits(tmp_path / "darker.onnx", images[64:]), expected)


def test_the_file_for_tensorrt_holds_nothing_that_its_parser_refuses(static):
    model = onnx.load(static["tensorrt"])
    assert unsupported(model) == []
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in model.graph.node}
    held = tensors(static["tensorrt"])
    assert not any(array.dtype == np.uint8 for array in held.values())
    pairs = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    for node in pairs:
        zero_point = held[node.input[2]]
        assert zero_point.dtype == np.int8 and not zero_point.any()


def test_the_other_files_are_not_for_tensorrt(dynamic, static):
    assert any("DynamicQuantizeLinear" in fault for fault in unsupported(onnx.load(dynamic)))
    assert any("uint8" in fault or "zero point" in fault for fault in unsupported(onnx.load(static["cpu"])))


def test_the_biases_of_the_file_for_tensorrt_stay_float(static):
    assert not any(array.dtype == np.int32 for array in tensors(static["tensorrt"]).values())
    assert any(array.dtype == np.int32 for array in tensors(static["cpu"]).values())


def test_the_metadata_says_what_the_file_is(dynamic, static):
    files = {"dynamic": dynamic, "static, for cpu": static["cpu"], "static, for tensorrt": static["tensorrt"]}
    for kind, path in files.items():
        properties = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
        assert properties == {"dtype": "int8", "quantization": kind}


def test_a_quantised_file_takes_any_number_of_images(quantised, images):
    assert logits(quantised, images[:1]).shape == (1, 10)
    assert logits(quantised, images[:5]).shape == (5, 10)


@pytest.mark.parametrize("write", [quantize_dynamic, lambda a, b: quantize_static(a, b, np.zeros((1, 3, 48, 48), "f"))])
def test_what_cannot_be_quantised_is_refused_and_nothing_is_written(write, dynamic, exported, tmp_path):
    half = onnx.load(exported)
    half.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(1, np.float16), "half"))
    onnx.save(half, tmp_path / "half.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    for source, reason in [
        (tmp_path / "half.onnx", "is float16; int8 is made from float32"),
        (tmp_path / "text.onnx", "cannot be read as ONNX"),
        (tmp_path / "none.onnx", "cannot be read as ONNX"),
        (dynamic, "is quantised already"),
    ]:
        with pytest.raises(ConversionError, match=reason):
            write(source, tmp_path / "new.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half.onnx", "text.onnx"]


@pytest.mark.parametrize(
    ("calibration", "reason"),
    [
        (np.zeros((0, 3, 48, 48), np.float32), "there are none"),
        (np.zeros((1, 3, 32, 48), np.float32), "takes float32 images of shape"),
        (np.zeros((1, 3, 48, 48), np.float64), "takes float32 images of shape"),
    ],
)
def test_calibration_images_must_be_the_models(exported, calibration, reason, tmp_path):
    with pytest.raises(ConversionError, match=reason):
        quantize_static(exported, tmp_path / "new.onnx", calibration)


def test_a_failure_in_the_middle_leaves_the_old_file(exported, tmp_path, monkeypatch):
    from onnxruntime import quantization

    def fails(model, new, **_):
        Path(new).write_bytes(b"half a file")
        raise OSError("No space left on device")

    monkeypatch.setattr(quantization, "quantize_dynamic", fails)
    (tmp_path / "new.onnx").write_bytes(b"old")
    with pytest.raises(ConversionError, match=r"new\.onnx could not be written: no space left"):
        quantize_dynamic(exported, tmp_path / "new.onnx")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named(exported, tmp_path, monkeypatch, missing):
    import sys

    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingExtra, match=r"onnx.*pip install -e '\.\[onnx\]'"):
        quantize_dynamic(exported, tmp_path / "new.onnx")
