"""What version 0.1.0 wrote is still read: runs go on, files load, exported files run.

`written-by-0.1.0.tar.xz` was written at commit 99efbab, the variant `ti` shrunk as by the fixture `small_variant`: a
digits run that was killed between two checkpoints, a run on the folder `pictures` that was stopped, what both log where
nothing stops them, and one file of every format, all with the weights of the digits run at its end.
"""

import json
import tarfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import load_flax, load_weights
from train.evaluate import main as evaluate
from train.main import main as train


@pytest.fixture
def written(tmp_path, monkeypatch):
    """The folder in which everything lies, as the current folder."""
    with tarfile.open(Path(__file__).with_name("written-by-0.1.0.tar.xz")) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def logged_alike(written):
    """Compares what a run has logged with what version 0.1.0 logs where nothing stops it."""

    def check(run, expected):
        got, expected = _lines(written / run / "metrics.jsonl"), _lines(written / "expected" / expected)
        assert [line.keys() for line in got] == [line.keys() for line in expected]
        for line, other in zip(got, expected, strict=True):
            # other processors round otherwise; an image more or less is a quarter of a per cent
            assert line == pytest.approx(other, rel=1e-3, abs=0.3)
        return got

    return check


@pytest.mark.slow
def test_a_killed_run_goes_on_and_is_evaluated(written, logged_alike, small_variant, digits_dir, capsys):
    assert train(["--resume=digits-run", f"--data-dir={digits_dir}"]) == 0
    assert "continued after step 9 of 44" in capsys.readouterr().out
    evaluations = [line for line in logged_alike("digits-run", "digits.jsonl") if "eval/top1" in line]
    best = max(evaluations, key=lambda line: line["eval/top1"])  # what the folder's name alone stands for
    flags = ["--dataset=digits", f"--data-dir={digits_dir}", "--batch-size=64"]
    assert evaluate(["--weights=digits-run", *flags]) == 0
    out = capsys.readouterr().out
    assert f"top-1         {best['eval/top1']:.2f} %" in out
    assert f"loss          {best['eval/loss']:.4f}" in out


def test_a_stopped_run_on_a_folder_goes_on(written, logged_alike, small_variant, capsys):
    assert train(["--resume=folder-run"]) == 0
    assert "continued after step 6 of 12" in capsys.readouterr().out
    logged_alike("folder-run", "folder.jsonl")


def test_the_folder_of_a_run_that_did_not_end_is_a_source(written, small_variant):
    weights = load_weights(written / "digits-run")
    assert weights.tensors.keys() == load_weights(written / "files" / "model.safetensors").tensors.keys()
    assert weights.class_names == tuple("0123456789")


def _images():
    return np.random.default_rng(0).normal(size=(2, 24, 24, 3)).astype(np.float32)


@pytest.mark.parametrize(
    ("file", "bound"),
    [("model.safetensors", 1e-5), ("model.flax.safetensors", 1e-5), ("model.pth", 0.02), ("orbax", 2e-3)],
)
def test_files_of_weights_load(written, small_variant, file, bound):
    expected = np.load(written / "files" / "logits.npy")
    with jax.default_matmul_precision("highest"):
        logits = load_flax(written / "files" / file, image_size=24, image_scale=(1.0, 2 / 3))(jnp.asarray(_images()))
    np.testing.assert_allclose(logits, expected, atol=bound * np.abs(expected).max())


def test_exported_files_run(written, small_variant):
    import onnxruntime
    import torch
    from jax import export

    from convert.export.torchao import load_torchao

    files, images, expected = written / "files", _images(), np.load(written / "files" / "logits.npy")
    program = export.deserialize(bytearray((files / "model.stablehlo").read_bytes()))
    np.testing.assert_allclose(program.call(images), expected, atol=1e-5)
    session = onnxruntime.InferenceSession(files / "model.onnx")
    given = session.get_inputs()[0]
    half = images.transpose(0, 3, 1, 2).astype(np.float16 if "16" in given.type else np.float32)
    np.testing.assert_allclose(session.run(None, {given.name: half})[0], expected, atol=0.01)
    with torch.inference_mode():
        quantised = load_torchao(files / "model.pt")(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    np.testing.assert_allclose(quantised, expected, atol=0.1)
    assert onnxruntime.InferenceSession(files / "model-int8.onnx").get_inputs()[0].type == "tensor(uint8)"
