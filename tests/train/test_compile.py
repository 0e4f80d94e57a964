"""`python -m train.compile`: for the devices here, and for slices of TPUs where libtpu is installed."""

import dataclasses
import importlib.util
import json
import math
import os
import re
import subprocess
import sys

import jax
import pytest

from crossvit_jax.config import VARIANTS
from train.compile import main
from train.cost import slices

_DIGITS = ("--recipe=digits", "--num-classes=10")


@pytest.fixture
def run(capsys):
    """Runs the command with flags: status, standard output and error."""

    def _run(*flags):
        try:
            status = main(flags)
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return _run


def test_the_figures_of_a_step_on_the_devices_here(run, small_variant):
    status, out, err = run(*_DIGITS, "--batch-size=16")
    assert (status, err) == (0, "compiling ti for the devices here, batch 16 …\n")
    lines = out.splitlines()
    assert lines[0] == "CrossViT ti, 10 classes, float32, batch 16 on 1 x cpu (local), mesh data=1,fsdp=1"
    assert lines[1].startswith("memory per device: ")
    told = re.fullmatch(r"FLOPs per step: ([\d.]+) M in matrix products and convolutions; ([\d.]+) M by .*", lines[2])
    assert float(told[1]) < float(told[2]) < 1.3 * float(told[1])
    assert lines[3] == "communication per step and device: none"
    assert re.fullmatch(r"compiled in \d+ s", lines[4])
    assert lines[5] == "fits"


def test_a_step_that_does_not_fit_says_so_with_its_own_status(run, small_variant, monkeypatch):
    monkeypatch.setattr("train.devices.memory.available_memory", lambda mesh: 2**20)
    status, out, _ = run(*_DIGITS, "--batch-size=16")
    assert status == 1
    assert re.search(r"^does not fit: a step needs .* more than the 1 MiB that it has; what would help: --", out, re.M)


def test_the_figures_of_a_forward_pass_and_the_file_of_them(run, small_variant, tmp_path):
    file = tmp_path / "report.json"
    status, out, err = run(*_DIGITS, "--batch-size=16", "--inference", f"--json={file}")
    assert (status, err) == (0, "compiling ti for the devices here, batch 16 …\n")
    lines = out.splitlines()
    assert lines[0].startswith("CrossViT ti, inference, 10 classes, float32, batch 16 on 1 x cpu (local)")
    assert re.search(r"^memory per device: .* \(parameters .*, batches .*, activations ", lines[1])
    assert lines[2].startswith("FLOPs per forward pass: ")
    content = json.loads(file.read_text())
    assert content["run"] == "nothing was run"
    assert content["versions"]["jax"] == jax.__version__
    (result,) = content["results"]
    assert result["inference"] is True
    assert result["roofline"] is None
    assert (result["config"]["batch_size"], result["devices"], result["run"]) == (16, 1, "nothing was run")
    assert result["memory"]["batches"] == 3 * 16 * math.prod(result["config"]["image_size"] for _ in range(2)) * 3
    status, _, _ = run(*_DIGITS, "--batch-size=16", "--inference", f"--json={file}")
    assert status == 0  # its own file is replaced


def test_a_forward_pass_that_does_not_fit_says_so(run, small_variant, monkeypatch):
    monkeypatch.setattr("train.devices.memory.available_memory", lambda mesh: 2**20)
    status, out, _ = run(*_DIGITS, "--batch-size=16", "--inference")
    assert status == 1
    told = r"^does not fit: a forward pass needs .* 1 MiB that it has; what would help: a smaller --batch-size$"
    assert re.search(told, out, re.M)


def test_a_file_of_others_is_not_replaced(run, tmp_path):
    file = tmp_path / "precious.json"
    file.write_text("[1]")
    status, _, err = run(*_DIGITS, f"--json={file}")
    assert (status, len(err.splitlines())) == (2, 1)
    assert file.read_text() == "[1]"


def test_a_program_that_the_compiler_refuses_is_told_as_far_as_it_is_known(run, small_variant, monkeypatch):
    def refuse(self, *_):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (26.86G) "
            "exceeds available HBM (15.75G)."
        )

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    status, out, _ = run(*_DIGITS, "--batch-size=16")
    assert status == 1
    assert "FLOPs per step: " in out
    assert "does not fit: a step needs 26.9 GiB on each device, 11.1 GiB more" in out
    status, out, _ = run(*_DIGITS, "--batch-size=16", "--variant", "ti", "ti")
    assert (status, out.count("| 26.9 GiB |")) == (1, 2)
    assert out.count("\nti on local does not fit: a step needs 26.9 GiB") == 2


def test_several_variants_are_a_table(run, small_variant, monkeypatch):
    monkeypatch.setitem(VARIANTS, "s", dataclasses.replace(VARIANTS["ti"], name="s"))
    status, out, _ = run(*_DIGITS, "--batch-size=16", "--variant", "ti", "crossvit_small_240")
    assert status == 0
    head, rule, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines())
    assert set(rule) == {"---"}
    assert [row[0] for row in rows] == ["ti", "s"]
    for row in rows:
        cells = dict(zip(head, row, strict=True))
        assert (cells["slice"], cells["devices"], cells["fits"]) == ("local", "1 x cpu", "yes")
        assert cells["all-reduce"] == cells["sent"] == "0 KiB"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--variant", "ti", "huge"], "unknown CrossViT variant 'huge'"),
        (["--batch-size=10", "--mesh=fsdp=3"], "mesh fsdp=3 takes 3 devices; there are 1"),
        (["--num-classes=0"], "--num-classes: must be at least 1; got 0"),
        (["--image-size=100"], "image height 100 does not divide into whole patches"),
        (["--recipe=paper"], "invalid choice: 'paper'"),
        (["--topologie=v5e:4x4"], "unrecognized arguments"),
        (["--topology=h900"], "no topology 'h900': slices of TPUs are written like v5e:4x4, GPUs like h100 or h100:8;"),
        (["--fit"], "--fit: tells the batches of training steps on GPUs: --topology h200 h100"),
        (["--fit", "--topology=v5e:4x4"], "--fit: tells the batches of training steps on GPUs"),
        (["--fit", "--inference", "--topology=h100"], "--fit: tells the batches of training steps on GPUs"),
        (["--json=/nowhere/report.json"], "/nowhere/report.json: the folder /nowhere does not exist"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(run, flags, message):
    status, out, err = run(*flags)
    assert (status, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("python -m train.compile: error: ")
    assert message in line


def test_without_libtpu_the_extra_is_named(run, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    status, _, err = run("--topology=v5e:2x2")
    assert status == 2
    assert err == (
        "python -m train.compile: error: --topology needs libtpu, the TPU's compiler: pip install -e '.[tpu]'\n"
    )


def test_without_the_gpus_compiler_the_missing_wheels_are_named(run, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    status, _, err = run("--topology=h100")
    assert status == 2
    assert err == (
        "python -m train.compile: error: --topology of GPUs needs jax-cuda13-plugin, jax-cuda13-pjrt, "
        "nvidia-cuda-nvcc, nvidia-nvvm, nvidia-cudnn-cu13: pip install -e '.[gpu-compile]'\n"
    )


def test_what_the_environment_says_stays(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: type("Spec", (), {"origin": "libtpu.py"}))
    monkeypatch.setattr(os, "environ", {"JAX_PLATFORMS": "tpu"})
    slices.prepare_environment()
    assert os.environ["JAX_PLATFORMS"] == "tpu"
    assert os.environ["TPU_SKIP_MDS_QUERY"] == "1"


def test_help_needs_no_jax():
    code = (
        "import sys, train.compile as c\ntry: c.main(['--help'])\n"
        "except SystemExit: assert not {'jax', 'torch', 'grain'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert (result.returncode, result.stderr) == (0, "")
    assert "--topology TOPOLOGY [TOPOLOGY ...]" in result.stdout


# --- with the TPU's own compiler ---


def test_a_slice_that_does_not_exist_is_one_line(without_tpu, run):
    status, _, err = run("--topology=v5e:3x3")
    assert status == 2
    (line,) = err.splitlines()
    assert "no topology 'v5e:3x3', write it like v5e:4x4 or v5p:4x4x4" in line
