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
    """All forms of weights that were trained in floating point; the first, `REFERENCE`, is what they are measured by.

    Args:
        weights: in float32.
        folder: for their files.
        calibration: normalised training images, for static quantisation.

    Raises:
        ConversionError: a file cannot be written.
    """
    forms = {REFERENCE: _float32(weights, folder / "float32.safetensors")}
    say("making ONNX float32 and float16")
    exported, half = folder / "float32.onnx", folder / "float16.onnx"
    write_bytes(exported, onnx_graph(weights).SerializeToString())
    write_bytes(half, onnx_graph(weights, "float16").SerializeToString())
    forms[FLOAT_FILE] = _form(exported, "onnxruntime", "float32")
    forms["ONNX float16"] = _form(half, "onnxruntime", "float16")
    for name, file in _int8(exported, folder, calibration).items():
        forms[f"ONNX {name}"] = _form(file, "onnxruntime", "int8")
    say("making StableHLO float32")
    program = folder / "float32.stablehlo"
    write_bytes(program, stablehlo_program(weights))
    forms["StableHLO float32"] = _form(program, "stablehlo", "float32")
    return forms


def qat_forms(weights: Weights, folder: Path, calibration: Calibration) -> dict[str, Form]:
    """The int8 forms of weights that were trained quantisation-aware; see `float_forms`."""
    from train.optim.quantize import quantised

    say("making the integers of quantisation-aware training")
    source = _float32(weights, folder / "qat.safetensors").file
    integers = quantised(flax_model(weights), "int8")
    size = sum(array.nbytes for array in jax.tree.leaves(nnx.state(integers)))
    forms = {"QAT int8, qwix in JAX": Form(runs_in="qwix", file=source, bytes=size, dtype="int8", qat=True)}
    exported = folder / "qat.onnx"
    write_bytes(exported, onnx_graph(weights).SerializeToString())
    for name, file in _int8(exported, folder, calibration).items():
        forms[f"QAT weights, ONNX {name}"] = _form(file, "onnxruntime", "int8", qat=True)
    return forms


def _float32(weights: Weights, file: Path) -> Form:
    write(weights, file)
    return _form(file, "torch", "float32")


def _int8(exported: Path, folder: Path, calibration: Calibration) -> dict[str, Path]:
    files = {f"int8 {kind}": folder / f"{exported.stem}-{kind}.onnx" for kind in ("dynamic", "static")}
    say("making ONNX int8, dynamic and static")
    quantize_dynamic(exported, files["int8 dynamic"])
    quantize_static(exported, files["int8 static"], calibration)
    return files


def _form(file: Path, runs_in: str, dtype: str, *, qat: bool = False) -> Form:
    return Form(runs_in=runs_in, file=str(file), bytes=file.stat().st_size, dtype=dtype, qat=qat)
