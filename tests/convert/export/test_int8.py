"""`python -m convert SOURCE DEST.onnx --quantize`: what it writes, prints and refuses."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from convert import load_weights
from convert.__main__ import main
from convert.export.compare import BOUNDS, Comparison
from convert.export.export import Export, export
from convert.export.onnx_graph import onnx_graph
from convert.export.onnx_int8 import float_products
from convert.models import save
from crossvit_jax.config import get_config
from crossvit_torch import create_model
from tests.convert.conftest import refused, run
from tests.convert.tensorrt import unsupported

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

CONFIG = get_config("ti", num_classes=10, image_size=48, image_scale=(1.0, 2 / 3), depth=(1, 2), stages=1)


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The weights of one stage, with a head that is large enough for the classes to lie apart."""
    torch.manual_seed(0)
    model = create_model("ti", **{name: getattr(CONFIG, name) for name in _CHANGED})
    with torch.no_grad():
        for head in model.head:
            head.weight.mul_(50)
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save(model.state_dict(), model.config, path)
    return path


_CHANGED = ("num_classes", "image_size", "image_scale", "depth", "stages")


@pytest.fixture(scope="session")
def exported(small):
    return onnx_graph(load_weights(small))


@pytest.fixture(autouse=True)
def exported_once(exported, monkeypatch):
    """The export takes most of the time and is tested elsewhere."""
    monkeypatch.setattr("convert.export.onnx_graph.onnx_graph", lambda weights, dtype: exported)


@pytest.fixture
def pictures(tmp_path):
    """A folder of 12 image files."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(12):
        coarse = np.random.default_rng(index).integers(0, 256, (6, 8, 3), np.uint8)
        Image.fromarray(coarse).resize((80, 60), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    return folder


def _operators(path):
    return {node.op_type for node in onnx.load(path).graph.node}


def test_dynamic_needs_no_images(capsys, small, tmp_path):
    path = tmp_path / "int8.onnx"
    status, out, err = run(capsys, small, path, "--quantize", "dynamic")
    assert (status, err) == (0, "")
    assert f"written     {path}, {path.stat().st_size:,} bytes\n" in out
    assert "on 64 photographs its logits differ" in out
    assert "top-1 agreement" in out
    assert "MatMulInteger" in _operators(path)
    assert path.stat().st_size < small.stat().st_size / 2.5


def test_the_exporters_resize_and_products_of_activations_are_found(exported):
    # two of the resize, and of each attention's scores and weighted values: 3 self-attentions, 2 cross-attentions
    assert len(float_products(exported)) == 2 + 2 * 5


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_static_is_calibrated_and_compared_on_other_images(capsys, small, tmp_path, target):
    path = tmp_path / "int8.onnx"
    args = ("--quantize", "static", "--calibrate", "digits", "--calibration-images", 32, "--target", target)
    status, out, err = run(capsys, small, path, *args)
    assert (status, err) == (0, "")
    assert "on 64 images that it was not calibrated on its logits differ" in out
    properties = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert properties["quantization"] == f"static, for {target}"
    assert json.loads(properties["image_size"]) == [48, 48]
    assert "QuantizeLinear" in _operators(path)
    assert (unsupported(onnx.load(path)) == []) == (target == "tensorrt")


def test_too_few_images_are_told(capsys, small, pictures, tmp_path):
    args = ("--quantize", "static", "--calibrate", pictures, "--calibration-images", 20)
    status, out, err = run(capsys, small, tmp_path / "int8.onnx", *args)
    assert status == 0
    assert err.startswith("warning: calibrating on 12 images, 20 were asked for; with fewer than 32 ")
    assert "on the 12 calibration images themselves" in out


def test_too_few_images_and_files_left_out_are_told_before_the_work(capsys, small, pictures, tmp_path, monkeypatch):
    def fail(weights, dtype):
        raise RuntimeError("the work")

    monkeypatch.setattr("convert.export.onnx_graph.onnx_graph", fail)
    (pictures / "phone.heic").touch()
    args = ("--quantize", "static", "--calibrate", f"folder:{pictures}")
    _, _, err = run(capsys, small, tmp_path / "int8.onnx", *args)
    warning, left_out, error = err.splitlines()
    assert warning.startswith("warning: calibrating on 12 images, 128 were asked for")
    assert left_out == "warning: left out, as their suffix is none of an image: 1 .heic"
    assert "the work" in error


def test_the_digits_calibrate_no_model_of_other_classes(capsys, small, tmp_path):
    args = ("--quantize", "static", "--calibrate", "digits", "--num-classes", 7)
    status, _, err = run(capsys, small, tmp_path / "int8.onnx", *args)
    assert status == 2
    assert "--calibrate digits is for models of the 10 digits, and this one has 7 classes" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_failure_of_onnx_runtime_is_told_once(capsys, small, tmp_path, monkeypatch, kind):
    from onnxruntime import quantization

    def fail(*_, **__):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(quantization, f"quantize_{kind}", fail)
    path = tmp_path / "int8.onnx"
    args = ("--calibrate", "digits") if kind == "static" else ()
    status, _, err = run(capsys, small, path, "--quantize", kind, *args)
    assert (status, err) == (2, f"python -m convert: error: {path} could not be written: no kernel\n")
    assert list(tmp_path.iterdir()) == []


def test_the_licence_asked_for_goes_into_the_graph_that_is_quantised(capsys, small, exported, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(
        "convert.export.onnx_graph.onnx_graph", lambda weights, dtype: told.append(weights.license) or exported
    )
    assert run(capsys, small, tmp_path / "int8.onnx", "--quantize", "dynamic", "--license", "MIT")[0] == 0
    assert told == ["MIT"]


def test_what_differs_too_much_is_not_kept(capsys, small, tmp_path, monkeypatch):
    monkeypatch.setitem(BOUNDS, "int8", 1e-6)
    (tmp_path / "int8.onnx").write_bytes(b"old")
    status, out, _ = run(capsys, small, tmp_path / "int8.onnx", "--quantize", "dynamic", "--overwrite")
    assert status == 1
    assert "NOT written" in out and "TOO MUCH" in out
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_logits_that_are_not_finite_do_not_pass():
    for spread, passes in ((float("nan"), False), (0.12 * 1.01, False), (0.12, True)):
        assert Comparison(largest=0.0, spread=spread, agreement=1.0, of="spread", bound=BOUNDS["int8"]).passed == passes
        assert Comparison(largest=spread, spread=0.0, agreement=1.0, of="largest", bound=0.12).passed == passes


@pytest.mark.parametrize(
    ("ending", "flags", "reason"),
    [
        (".safetensors", "--quantize dynamic", "--quantize dynamic is for .onnx files"),
        ("", "--quantize dynamic", "--quantize dynamic is for .onnx files"),
        (".pt", "--quantize static --calibrate digits", "--quantize static is for .onnx files"),
        (".onnx", "--calibrate digits", "--calibrate is for --quantize static"),
        (".onnx", "--quantize dynamic --calibrate digits", "--calibrate is for --quantize static"),
        (".onnx", "--quantize dynamic --calibration-images 8", "--calibration-images is for --quantize static"),
        (".onnx", "--quantize dynamic --target tensorrt", "--target is for --quantize static"),
        (".safetensors", "--target cpu", "--target is for --quantize static"),
        (".onnx", "--quantize static", "--quantize static needs images to calibrate with: --calibrate"),
        (".onnx", "--quantize static --calibrate nowhere", "nowhere"),
        (".onnx", "--quantize static --calibrate ~nobody-of-this-name/x", "~nobody-of-this-name is nobody's home"),
        (".onnx", "--quantize static --calibrate EMPTY", "no images in it"),
        (".onnx", "--quantize static --calibrate digits --calibration-images 0", "--calibration-images"),
        (".onnx", "--quantize dynamic --dtype float16", "--dtype float16"),
        (".onnx", "--quantize dynamic --dtype bfloat16", "--dtype bfloat16"),
        (".onnx", "--quantize int4", "--quantize int4 is for .pt files"),
        (".onnx", "--quantize dynamic --compare digits", "--compare is for .pt files"),
    ],
)
def test_what_cannot_be_honoured_is_refused_before_the_source_is_read(capsys, tmp_path, ending, flags, reason):
    (tmp_path / "empty").mkdir()
    flags = flags.replace("EMPTY", str(tmp_path / "empty")).split()
    assert reason in refused(capsys, tmp_path / "no such source", tmp_path / f"new{ending}", *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_int8_of_half_precision_is_refused_unless_asked_for(capsys, small, tmp_path, dtype):
    half = tmp_path / "half.safetensors"
    assert main([str(small), str(half), "--dtype", dtype]) == 0
    capsys.readouterr()
    line = refused(capsys, half, tmp_path / "int8.onnx", "--quantize", "dynamic")
    assert f"the weights are {dtype}; --dtype float32 takes them" in line
    status, out, _ = run(capsys, half, tmp_path / "int8.onnx", "--quantize", "dynamic", "--dtype", "float32")
    assert status == 0
    assert f"float32 (stored as {dtype})" in out


def test_a_broken_image_is_named_and_nothing_written(capsys, small, pictures, tmp_path):
    for name in ("5.png", "6.png"):  # one of so many would be left out
        (pictures / name).write_bytes(b"broken")
    args = ("--quantize", "static", "--calibrate", pictures)
    status, _, err = run(capsys, small, tmp_path / "int8.onnx", *args)
    assert status == 2
    assert "6.png cannot be read as an image" in err and err.count("\n") == 1
    assert not (tmp_path / "int8.onnx").exists()


def test_a_missing_package_is_named(capsys, small, tmp_path, monkeypatch):
    from importlib import util

    found = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *rest: None if name == "onnxruntime" else found(name, *rest))
    line = refused(capsys, small, tmp_path / "int8.onnx", "--quantize", "dynamic")
    assert "needs onnxruntime: pip install -e '.[onnx]'" in line


def test_the_images_compared_on_are_of_all_folders_and_not_the_calibrations(small, pictures, tmp_path, monkeypatch):
    used = {}

    def quantize(source, destination, images, *, target):
        used["calibration"] = images
        destination.write_bytes(source.read_bytes())

    def kept(images):
        used.setdefault("to", []).append(images)
        return images[:, 0, 0]

    monkeypatch.setattr("convert.export.onnx_int8.quantize_static", quantize)
    monkeypatch.setattr("convert.export.onnx_graph.run_torch", lambda weights: kept)
    monkeypatch.setattr("convert.export.onnx_graph.run_onnx", lambda path, **_: lambda images: images[:, 0, 0])
    how = Export(quantize="static", calibrate=str(pictures), calibration_images=8)
    (comparison,) = export(load_weights(small), tmp_path / "int8.onnx", how).comparisons
    assert comparison.passed and comparison.spread == 0
    used["to"] = np.concatenate(used["to"]).transpose(0, 3, 1, 2)
    assert (len(used["calibration"]), len(used["to"])) == (8, 4)
    assert len(np.unique(np.concatenate([used["calibration"], used["to"]]), axis=0)) == 12
