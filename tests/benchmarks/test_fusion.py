"""The table of what ONNX Runtime and XLA fuse: it counts nodes and kernels as the runtimes have them."""

import importlib.util

import jax
import pytest
from flax import nnx

from benchmarks.fusion import LEVELS, main, onnx_nodes, table, xla_kernels
from crossvit_jax import create_model

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def tiny():
    settings = {"image_size": 48, "image_scale": (1.0, 2 / 3), "depth": (1, 1), "stages": 1, "num_classes": 5}
    model = create_model("ti", **settings, rngs=nnx.Rngs(0))
    model.eval()
    return model


def test_the_nodes_of_a_file_are_counted_as_onnx_runtime_fuses_them(tmp_path):
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 20]>
        g (float[n, 4] x, float[4] bias) => (float[n, 4] y) { a = Add(x, bias) b = Gelu(a) y = Identity(b) }"""
    )
    onnx.save(model, tmp_path / "x.onnx")
    disabled, basic, extended, everything = (onnx_nodes(tmp_path / "x.onnx", level) for level in LEVELS)
    assert disabled == {"Add": 1, "Gelu": 1, "Identity": 1}
    assert basic == {"Add": 1, "Gelu": 1}
    assert extended == everything == {"com.microsoft.BiasGelu": 1}


def test_the_kernels_of_xla_are_fewer_than_the_operations_traced(tiny):
    traced, kinds = xla_kernels(tiny, 1)
    assert 100 < kinds.total() < traced
    assert kinds["fusion kLoop"] > 10
    assert not {"parameter", "constant", "bitcast"} & set(kinds)


@pytest.mark.slow
def test_the_table_has_a_row_for_each_file_and_each_batch(tiny):
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table(tiny).splitlines()]
    assert [row[0] for row in rows] == [
        *("ONNX Runtime", "---", "float32", "dynamic int8", "", f"XLA, {jax.default_backend()}", "---"),
        *("batch 1", "batch 8"),
    ]
    for row in rows[2:4]:
        disabled, basic, extended, everything = (int(cell.replace(",", "")) for cell in row[1:5])
        assert max(extended, everything) < min(disabled, basic)
    assert "FusedMatMul" in rows[2][5] and "DynamicQuantizeMatMul" in rows[3][5]


def test_an_unknown_variant_is_told_in_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--variant", "resnet"])
    assert capsys.readouterr().err.count("\n") == 1


def test_without_the_packages_for_onnx_nothing_is_counted_and_one_line_says_which(monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else found(name))
    assert main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "need onnxruntime: pip install -e '.[onnx]'" in line
