"""The forms in which a trained model is shipped, made by the converters of this project."""

from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float32

from benchmarks.rounds import say
from benchmarks.task import Form
from convert.export.onnx_graph import onnx_graph
from convert.export.onnx_int8 import quantize_dynamic, quantize_static
from convert.export.stablehlo import stablehlo_program
from convert.files import write_bytes
from convert.formats.write import write
from convert.models import flax_model
from convert.weights import Weights

REFERENCE = "torch float32, eager"
FLOAT_FILE = "ONNX float32"  # what the others' sizes are compared with

Calibration = Float32[np.ndarray, "images 3 height width"]


def float_forms(weights: Weights, folder: Path, calibration: Calibration) -> dict[str, Form]:
    """All forms of weights in float32, as files in a folder; the first, `REFERENCE`, is what they are measured by.

    Static quantisation is calibrated on normalised training images. Raises ConversionError if a file cannot be written.
    """
    say("making safetensors, ONNX and StableHLO")
    torch, exported, half, program = (folder / name for name in ("w.safetensors", "32.onnx", "16.onnx", "stablehlo"))
    write(weights, torch)
    write_bytes(exported, onnx_graph(weights).SerializeToString())
    write_bytes(half, onnx_graph(weights, "float16").SerializeToString())
    write_bytes(program, stablehlo_program(weights))
    return {
        REFERENCE: _form(torch, "torch", "float32"),
        FLOAT_FILE: _form(exported, "onnxruntime", "float32"),
        "ONNX float16": _form(half, "onnxruntime", "float16"),
        **_int8("", exported, calibration),
        "StableHLO float32": _form(program, "stablehlo", "float32"),
    }


def qat_forms(weights: Weights, folder: Path, calibration: Calibration) -> dict[str, Form]:
    """The int8 forms of weights that were trained quantisation-aware; see `float_forms`."""
    from train.optim.quantize import quantised

    say("making the integers of quantisation-aware training")
    source, exported = folder / "qat.safetensors", folder / "qat.onnx"
    write(weights, source)
    write_bytes(exported, onnx_graph(weights).SerializeToString())
    size = sum(array.nbytes for array in jax.tree.leaves(nnx.state(quantised(flax_model(weights), "int8"))))
    qwix = Form(runs_in="qwix", file=str(source), bytes=size, dtype="int8", qat=True)
    return {"QAT int8, qwix in JAX": qwix} | _int8("QAT weights, ", exported, calibration, qat=True)


def _int8(prefix: str, exported: Path, calibration: Calibration, *, qat: bool = False) -> dict[str, Form]:
    dynamic, static = (exported.with_name(f"{exported.stem}-{kind}.onnx") for kind in ("dynamic", "static"))
    quantize_dynamic(exported, dynamic)
    quantize_static(exported, static, calibration)
    return {
        f"{prefix}ONNX int8 dynamic": _form(dynamic, "onnxruntime", "int8", qat=qat),
        f"{prefix}ONNX int8 static": _form(static, "onnxruntime", "int8", qat=qat),
    }


def _form(file: Path, runs_in: str, dtype: str, *, qat: bool = False) -> Form:
    return Form(runs_in=runs_in, file=str(file), bytes=file.stat().st_size, dtype=dtype, qat=qat)
