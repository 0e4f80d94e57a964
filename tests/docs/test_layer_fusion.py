"""The tables of what ONNX Runtime and XLA fuse: nodes and kernels are counted as the runtimes have them."""

import pytest
from flax import nnx

from crossvit_jax import create_model
from tests.docs.scripts import load_script

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def script():
    return load_script("layer_fusion")


@pytest.fixture(scope="module")
def tiny():
    settings = {"image_size": 48, "image_scale": (1.0, 2 / 3), "depth": (1, 1), "stages": 1, "num_classes": 5}
    model = create_model("ti", **settings, rngs=nnx.Rngs(0))
    model.eval()
    return model


def test_the_nodes_of_a_file_are_counted_as_onnx_runtime_fuses_them(script, tmp_path):
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 20]>
        g (float[n, 4] x, float[4] bias) => (float[n, 4] y) { a = Add(x, bias) b = Gelu(a) y = Identity(b) }"""
    )
    onnx.save(model, tmp_path / "x.onnx")
    disabled, basic, extended, everything = (script.onnx_nodes(tmp_path / "x.onnx", level) for level in script.LEVELS)
    assert disabled == {"Add": 1, "Gelu": 1, "Identity": 1}
    assert basic == {"Add": 1, "Gelu": 1}
    assert extended == everything == {"com.microsoft.BiasGelu": 1}


def test_the_kernels_of_xla_are_fewer_than_the_operations_traced(script, tiny):
    traced, kinds = script.xla_kernels(tiny, 1)
    assert 100 < kinds.total() < traced
    assert kinds["fusion kLoop"] > 10
    assert not {"parameter", "constant", "bitcast"} & set(kinds)


@pytest.mark.slow
def test_the_tables_have_a_row_for_each_file_and_each_batch(script, tiny):
    _, *files = script.onnx_rows(tiny)
    assert [name for name, *_ in files] == ["float32", "dynamic int8"]
    for _, *cells, _ in files:
        disabled, basic, extended, everything = (int(cell.replace(",", "")) for cell in cells)
        assert max(extended, everything) < min(disabled, basic)
    assert "FusedMatMul" in files[0][-1] and "DynamicQuantizeMatMul" in files[1][-1]
    assert [name for name, *_ in script.xla_rows(tiny)[1:]] == ["batch 1", "batch 8"]
