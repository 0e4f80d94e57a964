"""`python -m convert SOURCE DEST.onnx --preprocess`: pictures of any size go in, and evaluation's logits come out."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import create_transform

import convert.export.onnx_preprocess
from convert import load_weights
from convert.__main__ import main
from convert.export.compare import BOUNDS, photographs, picture_batches
from convert.export.onnx_graph import onnx_graph, run_torch
from convert.models import save
from crossvit_jax.config import get_config
from crossvit_jax.preprocess import preprocess_image
from crossvit_torch import create_model
from tests.convert.conftest import CLASS_NAMES, perturb, refused, run
from tests.convert.export.test_stablehlo import code_block, run_without_this_library
from tests.train.small_weights import save_small

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

CHINA, FLOWER = load_sample_images().images  # real photographs of 427 x 640 pixels
PICTURES = {
    "landscape": CHINA,
    "upright": np.ascontiguousarray(FLOWER.swapaxes(0, 1)),
    "small": np.ascontiguousarray(CHINA[100:131, 200:243]),
    "wide": np.ascontiguousarray(FLOWER[200:220]),
    "large": np.asarray(Image.fromarray(CHINA).resize((2001, 1333), Image.Resampling.LANCZOS)),
}


def session(model):
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.fixture(scope="session")
def exported(small, tmp_path_factory):
    """The file that the command makes in float32."""
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    assert main([str(small), str(path), "--preprocess"]) == 0
    return path


@pytest.fixture(scope="session")
def graph(small):
    """Without preprocessing."""
    return onnx_graph(load_weights(small))


@pytest.fixture
def exported_once(graph, monkeypatch):
    """The exporter returns what it has returned before: it takes most of the time and is tested elsewhere."""
    monkeypatch.setattr("convert.export.onnx_graph.onnx_graph", lambda weights, dtype="float32": graph)


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize(
    ("image_size", "crop_pct"), [(48, 0.875), (96, 1.0), ((48, 96), 0.875), ((96, 48), 0.9), (240, 0.875)]
)
def test_the_pixels_are_those_of_evaluation(picture, image_size, crop_pct):
    config = get_config("ti", image_size=image_size, image_scale=(1.0, 2 / 3), crop_pct=crop_pct)
    identity = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 20]>
        g (float[batch, 3, {config.image_size[0]}, {config.image_size[1]}] images) => (float[b, 3, h, w] y)
        {{ y = Identity(images) }}"""
    )
    model = convert.export.onnx_preprocess.with_preprocessing(identity, config)
    onnx.checker.check_model(model, full_check=True)
    (images,) = session(model).run(None, {"pictures": PICTURES[picture][None]})
    transform = create_transform((3, *config.image_size), interpolation="bicubic", crop_pct=crop_pct)
    expected = transform(Image.fromarray(PICTURES[picture])).numpy()
    assert images.shape == (1, *expected.shape)
    assert np.abs(images[0] - expected).max() < 1e-6  # one level is 0.017


def test_one_file_takes_any_number_of_pictures_of_any_size(exported, small):
    weights = load_weights(small)
    takes = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    for picture, count in (("landscape", 1), ("small", 3), ("upright", 2)):
        pictures = np.stack([np.roll(PICTURES[picture], 7 * i, axis=0) for i in range(count)])
        expected = run_torch(weights)(np.stack([preprocess_image(one, weights.config) for one in pictures]))
        (logits,) = takes.run(["logits"], {"pictures": pictures})
        assert logits.shape == (count, 5)
        assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max()


def test_the_file_says_what_it_takes(exported, graph):
    model = onnx.load(exported)
    onnx.checker.check_model(model, full_check=True)
    about, before = ({entry.key: entry.value for entry in it.metadata_props} for it in (model, graph))
    assert (
        about.pop("input") == "uint8 RGB pictures (batch, height, width, 3), in each call of one size, which may be any"
    )
    assert before.pop("input") == "normalised float32 images (batch, channels, height, width) of image_size"
    assert about == before and tuple(json.loads(about["class_names"])) == CLASS_NAMES
    (pictures,) = model.graph.input
    assert pictures.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    dims = [dim.dim_param or dim.dim_value for dim in pictures.type.tensor_type.shape.dim]
    assert dims == ["batch", "height", "width", 3]
    assert not model.functions and {opset.domain for opset in model.opset_import} == {""}


def test_the_code_in_the_documentation_prints_what_predict_does(tmp_path, capsys, monkeypatch):
    from train.predict import main as predict

    monkeypatch.setattr("train.devices.process.keep_compiled_programs", lambda: None)  # not in the user's folder
    weights = save_small(tmp_path / "w.safetensors", "abcdefgh")
    assert main([str(weights), str(tmp_path / "model.onnx"), "--preprocess"]) == 0
    for name, pixels in PICTURES.items():
        Image.fromarray(pixels).save(tmp_path / f"{name}.jpg", quality=90)
    code = code_block("Pictures of any size")
    assert ":.4f}" in code
    code = code.replace(":.4f}", ":.8f}")  # two rounded ones that are equal may differ by a whole fourth digit
    capsys.readouterr()
    paths = [str(tmp_path / f"{name}.jpg") for name in PICTURES]
    assert predict([f"--weights={weights}", "--format=jsonl", "--batch-size=4", *paths]) == 0
    seen = set()
    for line in map(json.loads, capsys.readouterr().out.splitlines()):
        shutil.copy(line["path"], tmp_path / "photo.jpg")
        printed = run_without_this_library(code, tmp_path).split()
        best = line["predictions"]
        assert printed[::2] == [prediction["class"] for prediction in best]
        probabilities = [float(text) for text in printed[1::2]]
        assert probabilities[0] < 0.99  # else wrong pixels would hardly be seen
        assert probabilities == pytest.approx([prediction["probability"] for prediction in best], rel=0, abs=1e-5)
        seen.add(tuple(printed))
    assert len(seen) == len(PICTURES)


def test_int8_files_compute_with_pictures_what_they_do_with_their_images(
    capsys, small, exported_once, tmp_path, monkeypatch
):
    monkeypatch.setitem(BOUNDS, "int8", 1.0)  # untrained, and of one stage: its classes lie close
    files = {flag: tmp_path / f"int8{flag}.onnx" for flag in ("", "--preprocess")}
    for flag, path in files.items():
        status, _, err = run(capsys, small, path, "--quantize", "dynamic", *filter(None, [flag]))
        assert (status, err) == (0, "")
    without, joined = (onnxruntime.InferenceSession(path) for path in files.values())
    for pictures, images in picture_batches(load_weights(small).config):
        (expected,) = without.run(None, {"images": np.ascontiguousarray(images.transpose(0, 3, 1, 2))})
        (logits,) = joined.run(None, {"pictures": pictures})
        assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max()
    about = {entry.key: entry.value for entry in onnx.load(files["--preprocess"]).metadata_props}
    assert about["quantization"] == "dynamic" and about["input"].startswith("uint8")


@pytest.mark.parametrize("flags", [[], ["--quantize", "dynamic"]])
def test_a_file_that_preprocesses_in_another_way_is_not_kept(
    capsys, small, exported_once, tmp_path, monkeypatch, flags
):
    monkeypatch.setitem(BOUNDS, "int8", 1.0)
    monkeypatch.setattr(convert.export.onnx_preprocess, "MEAN", (0.5, 0.5, 0.5))
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    status, out, err = run(capsys, small, path, "--preprocess", "--overwrite", *flags)
    assert (status, err) == (1, "")
    assert "NOT written" in out and out.count("TOO MUCH") == 1
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


@pytest.mark.parametrize(
    ("ending", "flags", "reason"),
    [
        (".safetensors", "", "--preprocess is for .onnx files"),
        ("", "", "--preprocess is for .onnx files"),
        (".stablehlo", "", "--preprocess is for .onnx files"),
        (".stablehlo", "--quantize dynamic", "--preprocess is for .onnx files"),
        (".onnx", "--quantize static --calibrate digits --target tensorrt", "float64, which TensorRT does not have"),
    ],
)
def test_what_cannot_be_honoured_is_refused_before_the_source_is_read(capsys, tmp_path, ending, flags, reason):
    assert reason in refused(capsys, tmp_path / "no source", tmp_path / f"new{ending}", "--preprocess", *flags.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", [[], ["--quantize", "dynamic"]])
@pytest.mark.parametrize(("changes", "reason"), [({"in_chans": 1}, "takes 1 channels")])
def test_a_model_whose_evaluation_is_another_is_refused(capsys, tmp_path, flags, changes, reason):
    settings = {"image_size": 48, "image_scale": (1.0, 2 / 3), "num_classes": 5, "stages": 1, "depth": (1, 1)}
    model = perturb(create_model("ti", **settings, **changes))
    source = save(model.state_dict(), model.config, tmp_path / "w.safetensors")
    status, _, err = run(capsys, source, tmp_path / "new.onnx", "--preprocess", *flags)
    assert status == 2
    assert reason in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def test_the_photographs_of_the_check_are_not_all_of_one_kind():
    config = get_config("ti")
    batches = picture_batches(config)
    assert sum(len(pictures) for pictures, _ in batches) == 16
    shapes = {pictures.shape[1:3] for pictures, _ in batches}
    assert len(shapes) == 3
    assert any(height > width for height, width in shapes) and any(height < width for height, width in shapes)
    assert any(min(shape) < 240 for shape in shapes)
    assert all(images.shape[1:] == photographs(config, 1).shape[1:] for _, images in batches)
