"""Exported segmenters return the logits of every pixel that their source does."""

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from convert import load_weights, save
from convert.export.compare import photographs
from convert.models import flax_model, torch_model
from convert.verify import run_flax
from crossvit_torch import CrossViTSegmenter
from tests.convert.conftest import perturb, run
from tests.small_model import small_segmenter


def _saved(folder, **settings):
    torch.manual_seed(0)
    model = perturb(CrossViTSegmenter(small_segmenter(**settings)))
    return save(model.state_dict(), model.config, folder / "segmenter.safetensors")


@pytest.mark.parametrize(
    ("settings", "dtype", "bound"),
    [
        ({"strides": (12, 24), "scse": True}, "float32", 1e-5),
        # whose last norm computes in float32 with parameters in half precision
        ({"decoder": "mask", "num_blocks": 1}, "float16", 0.01),
    ],
)
def test_an_onnx_file_has_the_twins_logits_at_full_resolution(capsys, tmp_path, settings, dtype, bound):
    source, path = _saved(tmp_path, **settings), tmp_path / "segmenter.onnx"
    status, out, err = run(capsys, source, path, "--dtype", dtype)
    assert (status, err) == (0, "")
    assert "pixels of the same class" in out
    onnx.checker.check_model(onnx.load(path), full_check=True)
    weights = load_weights(source)
    images = np.ascontiguousarray(photographs(weights.config, 3).transpose(0, 3, 1, 2))
    (logits,) = onnxruntime.InferenceSession(path).run(["logits"], {"images": images})
    with torch.inference_mode():
        expected = torch_model(weights)(torch.from_numpy(images)).numpy()
    assert (logits.shape, logits.dtype) == ((3, 4, 48, 48), np.float32)
    assert np.abs(logits - expected).max() <= bound * np.abs(expected).max()


def test_a_stablehlo_program_has_the_flax_models_logits(capsys, tmp_path):
    source, path = _saved(tmp_path, decoder="mask", num_blocks=1), tmp_path / "segmenter.stablehlo"
    status, out, err = run(capsys, source, path)
    assert (status, err) == (0, "")
    assert "pixels of the same class 100.0%" in out
    weights = load_weights(source)
    images = photographs(weights.config, 3)
    expected = np.asarray(run_flax(flax_model(weights), jnp.asarray(images)))
    logits = jax.jit(jax.export.deserialize(bytearray(path.read_bytes())).call)(images)
    assert logits.shape == (3, 48, 48, 4)
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()
