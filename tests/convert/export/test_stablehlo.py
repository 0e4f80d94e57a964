"""StableHLO files: jax alone runs them, with the Flax model's logits, on every platform they name."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert.export.stablehlo
from convert import load_weights
from convert.__main__ import main
from convert.export.compare import photographs
from convert.models import flax_model
from convert.verify import run_flax
from crossvit_jax.preprocess import MEAN, STD

DEPLOY = Path(__file__).parents[3] / "docs" / "deploy.md"

# what a program must do without; jax itself may import anything else
ABSENT = ("crossvit_jax", "crossvit_torch", "convert", "train", "benchmarks", "flax", "torch")
WITHOUT = f"""
import sys
class Absent:
    def find_spec(self, name, *_):
        if name.split(".")[0] in {ABSENT}:
            raise ImportError(f"{{name}} is not installed")
sys.meta_path.insert(0, Absent())
"""


def code_block(section: str) -> str:
    """The Python code in a section of docs/deploy.md."""
    text = DEPLOY.read_text(encoding="utf-8").split(f"\n## {section}\n")[1]
    return re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]


def run_without_this_library(code: str, folder: Path) -> str:
    """What the code prints, run in a folder by a Python that cannot import this library, Flax or torch."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-I", "-X", "utf8", "-c", WITHOUT + code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def weights(small):
    return load_weights(small)


def _run(capsys, *args):
    status = main([str(arg) for arg in args])
    return status, *capsys.readouterr()


@pytest.mark.parametrize(("dtype", "bound", "size"), [("float32", 1e-5, 4), ("float16", 0.02, 2), ("bfloat16", 0.1, 2)])
def test_it_computes_what_the_flax_model_does(capsys, small, weights, tmp_path, dtype, bound, size):
    path = tmp_path / "model.stablehlo"
    status, out, err = _run(capsys, small, path, "--dtype", dtype)
    assert (status, err) == (0, "")
    assert f"written     {path}, {path.stat().st_size:,} bytes\n" in out
    assert float(out.split("differ from the source's by ")[1].split()[0]) <= bound
    parameters = sum(array.size for array in weights.tensors.values())
    assert path.stat().st_size < size * parameters + 500_000

    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    images = photographs(weights.config, 3)
    expected = np.asarray(run_flax(flax_model(weights), jnp.asarray(images)))
    logits = jax.jit(exported.call)(images)
    assert (logits.dtype, logits.shape) == (jnp.float32, (3, 5))
    assert np.abs(logits - expected).max() <= bound * np.abs(expected).max()


def test_where_the_documentations_code_runs_this_library_cannot_be_imported(tmp_path):
    code = f"""
import importlib
for name in {ABSENT}:
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(error)
"""
    expected = "".join(f"{name} is not installed\n" for name in ABSENT)
    assert run_without_this_library(code, tmp_path) == expected


def test_the_code_in_the_documentation_runs_it_with_jax_alone(capsys, small, weights, tmp_path):
    assert _run(capsys, small, tmp_path / "model.stablehlo")[0] == 0
    pixels = np.random.default_rng(0).integers(0, 256, (2, 48, 48, 3), np.uint8)
    np.save(tmp_path / "pixels.npy", pixels)
    assert "float32[batch,48,48,3]" in run_without_this_library(code_block("StableHLO"), tmp_path)
    images = (pixels / np.float32(255) - np.float32(MEAN)) / np.float32(STD)
    expected = np.asarray(run_flax(flax_model(weights), jnp.asarray(images)))
    logits = np.load(tmp_path / "logits.npy")
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_program_that_computes_something_else_is_not_kept(capsys, small, tmp_path, monkeypatch):
    program = convert.export.stablehlo.stablehlo_program

    def of_other_weights(weights, dtype):
        return program(weights.astype(np.float16), dtype)

    monkeypatch.setattr(convert.export.stablehlo, "stablehlo_program", of_other_weights)
    status, out, err = _run(capsys, small, tmp_path / "model.stablehlo")
    assert (status, err) == (1, "")
    assert f"NOT written {tmp_path / 'model.stablehlo'}\n" in out
    assert "TOO MUCH" in out
    assert os.listdir(tmp_path) == []


def test_refusals_come_before_the_source_is_read(capsys, tmp_path):
    (tmp_path / "there.stablehlo").touch()
    for arguments, message in [
        ([tmp_path / "x.stablehlo", "--verify"], "--verify is for weights"),
        ([tmp_path / "there.stablehlo"], "exists; --overwrite"),
    ]:
        status, out, err = _run(capsys, "no-such-source.pth", *arguments)
        assert (status, out) == (2, "")
        assert message in err
    assert os.listdir(tmp_path) == ["there.stablehlo"]


def test_products_of_float32_files_are_full_float32_on_accelerators(weights):
    exported = jax.export.deserialize(bytearray(convert.export.stablehlo.stablehlo_program(weights)))
    products = re.findall(r"stablehlo\.(?:dot_general|convolution).*", exported.mlir_module())
    assert len(products) > 20
    assert all("HIGHEST" in product for product in products)
