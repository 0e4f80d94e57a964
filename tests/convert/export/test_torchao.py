"""`python -m convert SOURCE DEST.pt --quantize`: what it writes and refuses, and what comes back from its files."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from convert import ConversionError, load_torch, load_weights
from convert.__main__ import main
from convert.errors import MissingExtra
from convert.export.compare import BOUNDS
from convert.export.export import Export, export
from convert.export.torchao import is_quantised, load_torchao, quantised_twin, read_torchao
from convert.metadata import understand
from tests.convert.conftest import CLASS_NAMES, refused, run

pytest.importorskip("torchao")

SCHEMES = ("int8", "int4")


@pytest.fixture(scope="module", autouse=True)
def any_difference():
    """The weights of these tests are random: rounded to int4 their logits differ by a third of their spread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BOUNDS, "int4", 0.5)
        yield


@pytest.fixture(scope="module", params=SCHEMES)
def written(request, small, tmp_path_factory):
    """A scheme and a file of it; not to be changed."""
    path = tmp_path_factory.mktemp(request.param) / "m.pt"
    assert export(load_weights(small), path, Export(quantize=request.param)).passed
    return request.param, path


def logits(model, images):
    with torch.inference_mode():
        return model(images)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_source_becomes_a_file(capsys, small, tmp_path, scheme):
    path = tmp_path / "model.pt"
    licence = {"int8": [], "int4": ["--license", "MIT"]}[scheme]
    status, out, err = run(capsys, small, path, "--quantize", scheme, *licence)
    assert (status, err) == (0, "")
    assert "variant     custom; in timm: none" in out and "classes     5\n" in out
    assert f"written     {path}, {path.stat().st_size:,} bytes\n" in out
    assert "on 64 photographs its logits differ from the source's by 0." in out
    assert f"(bound {BOUNDS[scheme]})" in out
    assert path.stat().st_size < small.stat().st_size / 2  # a whole model's: / 3.1
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pt"]
    assert torch.load(path, weights_only=True)["license"] == {"int8": "Apache-2.0", "int4": "MIT"}[scheme]


def test_the_logits_of_the_file_are_those_of_the_model_that_was_written(written, small, images):
    scheme, path = written
    model = load_torchao(path)
    expected = logits(quantised_twin(load_weights(small), scheme), images)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(logits(model, images), expected)
    assert not torch.allclose(logits(load_torch(small), images), expected, rtol=0, atol=1e-5)


def test_the_chosen_layers_hold_integers_and_the_others_what_they_held(written, small):
    scheme, path = written
    top = {"int8": 127, "int4": 7}[scheme]
    plain = load_torch(small)
    chosen = {name for name, module in plain.named_modules() if is_quantised(module, name)}
    kinds = {name.split(".")[-1] if not name.split(".")[-1].isdigit() else name.split(".")[2] for name in chosen}
    assert kinds == {"qkv", "wq", "proj", "fc1", "fc2", "projs", "revert_projs"}
    # 2 self-attentions with MLP; for each of the 2 branches projs, wq, proj and revert_projs
    assert len(chosen) == 2 * 4 + 2 * 4
    tensors = read_torchao(path).tensors
    for name, tensor in plain.state_dict().items():
        layer, _, kind = name.rpartition(".")
        if layer in chosen and kind == "weight":
            values = tensors[name].qdata
            assert values.dtype == torch.int8 and values.min() >= -top - 1 and values.max() == top
            assert tensors[name].scale.shape == (len(tensor), 1)
            assert (tensors[name].dequantize() - tensor).abs().max() <= 0.51 * tensors[name].scale.max()
        else:
            assert type(tensors[name]) is torch.Tensor and torch.equal(tensors[name], tensor)


def test_torch_reads_the_file_as_plain_data_and_finds_what_it_is(written):
    scheme, path = written
    code = (
        "import sys, torch, torchao; stored = torch.load(sys.argv[1], weights_only=True); print(stored['class_names'])"
    )
    done = subprocess.run([sys.executable, "-I", "-X", "utf8", "-c", code, path], capture_output=True, encoding="utf-8")
    assert done.stdout == f"{list(CLASS_NAMES)}\n"

    stored = torch.load(path, weights_only=True)
    assert stored["quantize"] == scheme
    assert (stored["variant"], stored["num_classes"], stored["image_size"]) == ("custom", 5, (48, 48))
    config, class_names = understand(stored["crossvit"])
    read = read_torchao(path)
    assert (read.config, read.class_names, read.scheme) == (config, class_names, scheme)
    assert class_names == CLASS_NAMES


def test_what_differs_too_much_is_not_kept(capsys, small, tmp_path, monkeypatch):
    monkeypatch.setitem(BOUNDS, "int4", 1e-6)
    (tmp_path / "model.pt").write_bytes(b"old")
    status, out, _ = run(capsys, small, tmp_path / "model.pt", "--quantize", "int4", "--overwrite")
    assert status == 1
    assert f"NOT written {tmp_path / 'model.pt'}\n" in out and "TOO MUCH" in out
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_a_failure_in_the_middle_leaves_the_old_file(capsys, small, tmp_path, monkeypatch):
    def fails(path, data):
        path.write_bytes(data[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("convert.export.export.write_bytes", fails)
    (tmp_path / "model.pt").write_bytes(b"old")
    assert main([str(small), str(tmp_path / "model.pt"), "--quantize", "int8", "--overwrite"]) == 2
    assert "model.pt could not be written: no space left on device" in capsys.readouterr().err
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_it_is_compared_on_the_images_asked_for(capsys, small, tmp_path):
    folder = tmp_path / "pictures" / "class"
    folder.mkdir(parents=True)
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 256, (6, 8, 3), np.uint8)
        Image.fromarray(pixels).resize((80, 60), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    status, out, _ = run(capsys, small, tmp_path / "a.pt", "--quantize", "int8", "--compare", folder.parent)
    assert status == 0 and f"on 3 images of {folder.parent} its logits" in out
    status, out, _ = run(capsys, small, tmp_path / "b.pt", "--quantize", "int8", "--compare", "digits")
    assert status == 0 and "on 64 digits its logits" in out
    (folder / "1.png").write_bytes(b"broken")
    assert "1.png cannot be read as an image" in _second_line(capsys, small, tmp_path / "c.pt", folder)
    assert not (tmp_path / "c.pt").exists()


def _second_line(capsys, small, path, folder):
    """What is told on stderr, once the source was read."""
    assert main([str(small), str(path), "--quantize", "int8", "--compare", str(folder)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("name", "flags", "reason"),
    [
        ("model.pth", "", "--quantize int8 is for .pt files"),
        ("model", "", "--quantize int8 is for .pt files"),
        ("there.pt", "", "there.pt exists; --overwrite"),
        ("folder.pt", "--overwrite", "folder.pt is a folder"),
        ("no/model.pt", "", "no does not exist"),
        ("there.pt/", "", "there.pt exists; --overwrite"),
        ("model.pt", "--quantize int2", "--quantize"),
        ("model.pt", "--dtype bfloat16", "--dtype"),
        ("model.pt", "--verify", "--verify is for weights"),
        ("model.pt", "--compare nowhere", "nowhere: images come from 'digits' or a folder, and this is neither"),
        ("model.pt", "--compare FOLDER", "folder.pt: no images in it"),
        ("model.pt", "--compare folder:FOLDER", "folder.pt: no images in it"),
        ("model.pt", "--compare ~nobody-of-this-name", "~nobody-of-this-name is nobody's home folder"),
        ("model.pt", "", "no-such-source does not exist"),
    ],
)
def test_mistakes_are_told_in_one_line_before_any_work(capsys, tmp_path, name, flags, reason):
    (tmp_path / "there.pt").touch()
    (tmp_path / "folder.pt").mkdir()
    flags = flags.replace("FOLDER", str(tmp_path / "folder.pt")).split()
    assert reason in refused(capsys, tmp_path / "no-such-source", tmp_path / name, "--quantize", "int8", *flags)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.pt", "there.pt"]


def test_a_pt_file_is_of_integers(capsys, tmp_path):
    line = refused(capsys, tmp_path / "no-such-source", tmp_path / "model.pt")
    assert "model.pt: a .pt file is quantised: --quantize int8 or int4" in line


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_refused_unless_asked_for(capsys, small, tmp_path, dtype):
    half = tmp_path / "half.safetensors"
    assert main([str(small), str(half), "--dtype", dtype]) == 0
    capsys.readouterr()
    line = refused(capsys, half, tmp_path / "model.pt", "--quantize", "int8")
    assert f"the weights are {dtype}; --dtype float32 takes them" in line
    status, out, _ = run(capsys, half, tmp_path / "model.pt", "--quantize", "int8", "--dtype", "float32")
    assert status == 0 and f"stored as {dtype}" in out


def test_without_torchao_the_extra_is_named(capsys, small, written, tmp_path, monkeypatch):
    from importlib import util

    found = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *rest: None if name == "torchao" else found(name, *rest))
    line = refused(capsys, small, tmp_path / "model.pt", "--quantize", "int8")
    assert "needs torchao: pip install -e '.[torchao]'" in line
    with pytest.raises(MissingExtra, match=r"pip install -e '\.\[torchao\]'"):
        load_torchao(written[1])


def test_other_files_are_no_models(capsys, written, weights_file, tmp_path):
    _, path = written
    (tmp_path / "cut.pt").write_bytes(path.read_bytes()[:-1000])
    (tmp_path / "text.pt").write_text("text")
    stored = torch.load(path, weights_only=True)
    newer, lacking = tmp_path / "newer.pt", tmp_path / "lacking.pt"
    torch.save(stored | {"format": 2}, newer)
    tensors = {name: tensor for name, tensor in stored["quantized"].items() if name != "norm.0.weight"}
    torch.save(stored | {"quantized": tensors}, lacking)
    for file, reason in [
        (tmp_path / "none.pt", "none.pt does not exist"),
        (tmp_path / "cut.pt", "damaged"),
        (tmp_path / "text.pt", "damaged"),
        (weights_file, "no model that python -m convert wrote"),
        (newer, "written by a newer version"),
        (lacking, "holds other tensors than its model has"),
    ]:
        with pytest.raises(ConversionError, match=reason):
            load_torchao(file)
    # nor is a quantised model a source of weights
    assert str(path) in refused(capsys, path, tmp_path / "weights.safetensors")
    assert str(path) in refused(capsys, path, tmp_path / "again.pt", "--quantize", "int8")


def test_features_of_a_model_without_a_head(small, images, tmp_path):
    how = Export(quantize="int8")
    path, (comparison,) = export(load_weights(small, num_classes=0), tmp_path / "features.pt", how)
    assert comparison.passed
    assert logits(load_torchao(path), images).shape == (2, 96 + 192)


def test_our_module_of_the_same_name_does_not_hide_the_library(small, tmp_path):
    command = [sys.executable, "-m", "convert", small, tmp_path / "model.pt", "--quantize", "int8"]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-2].startswith("written     ")
