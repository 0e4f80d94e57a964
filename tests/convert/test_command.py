"""python -m convert: what it prints, and its exit status."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from convert import command_line, load_weights
from convert.verify import read_back
from tests.convert.conftest import refused, run, tiny

ROOT = Path(__file__).parents[2]


def test_it_prints_what_it_found_and_did(capsys, weights_file, tmp_path):
    status, out, err = run(capsys, weights_file, tmp_path / "out.safetensors")
    assert (status, err) == (0, "")
    assert "ti; in timm: timm.create_model('crossvit_tiny_240', num_classes=10, img_size=48, img_scale=(1, 2/3))" in out
    assert "48 x 48 pixels (the branches see 48 x 48 and 32 x 32), 3 channels" in out
    assert "classes     10\n" in out
    assert "304 tensors, 6,653,972" in out
    assert f"written     {tmp_path / 'out.safetensors'}\n" in out


def test_the_printed_call_makes_the_model_in_timm(capsys, weights_file, tmp_path):
    import timm

    _, out, _ = run(capsys, weights_file, tmp_path / "out.pth", "--num-classes", 4, "--image-size", 96)
    call = out.split("in timm: ")[1].split("\n")[0]
    model = eval(call, {"timm": timm})
    model.load_state_dict(torch.load(tmp_path / "out.pth", weights_only=True), strict=True)
    assert "new head for 4 classes instead of 10" in out
    assert "resampled from 4 x 4 and 2 x 2 patches to 8 x 8 and 4 x 4" in out


@pytest.mark.parametrize("ending", [".safetensors", ".pth", ".flax.safetensors", ""])
def test_verify_reads_back_and_runs_both_twins(capsys, weights_file, tmp_path, ending):
    status, out, err = run(capsys, weights_file, tmp_path / f"out{ending}", "--verify")
    assert (status, err) == (0, "")
    assert "every tensor comes back bit for bit" in out
    assert float(out.split("differ by ")[1].split()[0]) <= 1e-5


def test_a_pth_file_does_not_tell_its_rectangle(capsys, weights_file, tmp_path):
    path = tmp_path / "out.pth"
    assert run(capsys, weights_file, path, "--image-size", "48x96")[0] == 0
    assert read_back(load_weights(weights_file, image_size=(48, 96)), path)[1] == []
    assert "--image-size HxW" in refused(capsys, path, tmp_path / "again.pth")
    status, out, _ = run(capsys, path, tmp_path / "again.pth", "--image-size", "48x96")
    assert status == 0
    assert "48 x 96 pixels (the branches see 48 x 96 and 32 x 64)" in out


def test_verify_fails_where_the_twins_differ(capsys, weights_file, tmp_path, monkeypatch):
    import convert.verify

    twin = convert.verify.torch_model

    def changed(weights):
        model = twin(weights)
        with torch.no_grad():
            model.head[0].bias[0] += 1e-2
        return model

    monkeypatch.setattr(convert.verify, "torch_model", changed)
    status, out, _ = run(capsys, weights_file, tmp_path / "out.pth", "--verify")
    assert status == 1
    assert "TOO MUCH" in out


def test_verify_fails_where_the_file_differs(capsys, weights_file, tmp_path, monkeypatch):
    import convert.formats.write

    monkeypatch.setattr(
        convert.formats.write, "as_tensor", lambda array: torch.from_numpy(np.where(array == array.flat[0], 0, array))
    )
    status, out, _ = run(capsys, weights_file, tmp_path / "out.pth", "--verify")
    assert status == 1
    assert "NOT as converted" in out


def test_nan_weights_are_a_warning_and_fail_verification(capsys, state, tmp_path):
    state["head.0.bias"][:] = torch.nan
    torch.save(state, tmp_path / "nan.pth")
    status, out, err = run(capsys, tmp_path / "nan.pth", tmp_path / "out.pth", "--verify")
    assert status == 1
    assert err.startswith("warning: 10 of")
    assert "TOO MUCH" in out


def test_dtype_is_kept_or_changed_on_request(capsys, weights_file, tmp_path):
    _, out, _ = run(capsys, weights_file, tmp_path / "half", "--dtype", "bfloat16")
    assert "bfloat16 (stored as float32)" in out
    _, out, _ = run(capsys, tmp_path / "half", tmp_path / "half.pth")
    assert "parameters, bfloat16\n" in out
    assert load_weights(tmp_path / "half.pth").dtypes == ["bfloat16"]


def test_refusals_are_one_line_and_exit_status_2(capsys, weights_file, tmp_path, state):
    out = tmp_path / "out.pth"
    assert "DESTINATION" in refused(capsys, weights_file)
    assert "--num-classes" in refused(capsys, weights_file, out, "--num-classes", "-1")
    assert "--image-size" in refused(capsys, weights_file, out, "--image-size", "240,240")
    assert "unrecognized arguments: --over" in refused(capsys, weights_file, out, "--over")
    assert "nearest valid sizes" in refused(capsys, weights_file, out, "--image-size", "50")
    assert "does not exist" in refused(capsys, tmp_path / "none.pth", out)
    assert "~nobody-of-this-name is nobody's home folder" in refused(capsys, "~nobody-of-this-name/x.pth", out)
    assert "exists; --overwrite" in refused(capsys, tmp_path / "none.pth", weights_file)
    del state["norm.0.bias"]
    torch.save(state, tmp_path / "bad.pth")
    assert "1 missing (norm.0.bias)" in refused(capsys, tmp_path / "bad.pth", out)
    assert sorted(os.listdir(tmp_path)) == ["bad.pth", "weights.pth"]


_TOO_LONG = "x" * 256  # for Linux and others; what their names may have are 255 bytes


@pytest.mark.parametrize(
    ("source", "destination", "flags"),
    [
        (f"{_TOO_LONG}.pth", "out.pth", []),
        (f"{_TOO_LONG}/in.pth", "out.pth", []),
        ("weights.pth", f"{_TOO_LONG}.pth", []),
        ("weights.pth", _TOO_LONG, []),
        ("weights.pth", f"{_TOO_LONG}/out.pth", []),
        ("weights.pth", f"{_TOO_LONG}.stablehlo", []),
        ("weights.pth", "out.onnx", ["--quantize", "static", "--calibrate", _TOO_LONG]),
    ],
)
def test_a_name_that_is_too_long_is_refused_before_anything_is_read(
    capsys, weights_file, monkeypatch, source, destination, flags
):
    monkeypatch.chdir(weights_file.parent)
    assert "File name too long" in refused(capsys, source, destination, *flags)
    assert os.listdir() == ["weights.pth"]


@pytest.mark.parametrize("ending", [".pth", ""])
def test_a_name_may_be_as_long_as_the_system_allows(capsys, weights_file, tmp_path, ending):
    name = "ä" * ((255 - len(ending)) // 2) + ending
    assert run(capsys, weights_file, tmp_path / name)[0] == 0
    assert load_weights(tmp_path / name).config.num_classes == 10


def test_a_file_can_be_converted_in_place(capsys, weights_file):
    status, _, _ = run(capsys, weights_file, weights_file, "--overwrite", "--dtype", "float16", "--num-classes", 3)
    assert status == 0
    assert load_weights(weights_file).config.num_classes == 3


def test_an_interrupt_is_one_line(capsys, weights_file, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("convert.models.load_weights", interrupted)
    assert run(capsys, weights_file, tmp_path / "out.pth") == (130, "", "python -m convert: interrupted\n")


@pytest.mark.parametrize(("number", "status", "told"), [("SIGTERM", 143, "terminated"), ("SIGINT", 130, "interrupted")])
def test_a_command_that_is_stopped_leaves_nothing_half_written(weights_file, tmp_path, number, status, told):
    (tmp_path / "out.pth").write_bytes(b"old")
    code = f"""
import atexit, os, runpy, signal
import convert.formats.write
def stopped(path, data):
    path.write_bytes(data[:100])
    signal.raise_signal(signal.{number})
    path.write_bytes(data)
convert.formats.write.write_bytes = stopped
signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest may run where it is ignored
atexit.register(os._exit, 139)  # as jax may crash on the way out
runpy.run_module("convert", run_name="__main__")
"""
    command = [sys.executable, "-c", code, str(weights_file), str(tmp_path / "out.pth"), "--overwrite"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (status, f"python -m convert: {told}\n")
    assert "variant     ti" in done.stdout
    assert sorted(os.listdir(tmp_path)) == ["out.pth", "weights.pth"]
    assert (tmp_path / "out.pth").read_bytes() == b"old"


def test_sigterm_is_heeded_where_nobody_else_does_and_only_while_a_command_runs():
    def handler():
        return signal.getsignal(signal.SIGTERM)

    def during():
        seen = []
        assert command_line.run("x", lambda: seen.append(handler()) or 0) == 0
        return seen[0]

    def own(*_):
        pass

    before = handler()
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        assert callable(during()) and handler() == signal.SIG_DFL
        with ThreadPoolExecutor(1) as elsewhere:
            assert elsewhere.submit(during).result() == signal.SIG_DFL
        for theirs in (own, signal.SIG_IGN):
            signal.signal(signal.SIGTERM, theirs)
            assert during() == handler() == theirs
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_command_runs_in_a_process_of_its_own(weights_file, tmp_path, images, logits):
    command = [sys.executable, "-m", "convert", str(weights_file)]
    done = subprocess.run([*command, str(tmp_path / "out.pth")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    model = tiny().eval()
    model.load_state_dict(torch.load(tmp_path / "out.pth", weights_only=True), strict=True)
    with torch.inference_mode():
        assert torch.equal(model(images), logits)
    again = subprocess.run([*command, str(tmp_path / "out.pth")], capture_output=True, text=True)
    assert again.returncode == 2
    assert again.stderr.count("\n") == 1
