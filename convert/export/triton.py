"""A model repository for Triton Inference Server: pictures of any size in, probabilities out, batched between.

Triton batches only what has one shape, and pictures have many. So preprocessing is a model of its own that is not
batched, the classifier behind it is, and an ensemble makes one of the two. Its tensors have the names of
`python -m train.serve`, so that a client need not know which of them it asks.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from convert.errors import ConversionError, require
from convert.export.compare import ONNX_PACKAGES, Comparison, compare, picture_batches
from convert.files import check_place, replacing, typed_path, write_bytes
from convert.weights import Weights

if TYPE_CHECKING:
    import onnx

MODEL, VERSION = "crossvit", "1"  # the ensemble
INPUT, PROBABILITIES, CLASSES = "pictures", "probabilities", "classes"
_PREPROCESS, _CLASSIFY, _IMAGES = f"{MODEL}_preprocess", f"{MODEL}_classify", "images"
# Smaller ones would never let a request wait for others: Triton takes the largest preferred size that it can fill.
_PREFERRED = (8, 16, 32, 64)
_DELAY, _TIMEOUT, _QUEUE = 5_000, 10_000_000, 1_024  # microseconds for others, until it is refused; requests
_CONFIG = "config.pbtxt"
_OWN = (f"{MODEL}/{_CONFIG}", _PREPROCESS, _CLASSIFY)  # what is written


def check_repository(destination: str | Path, *, overwrite: bool = False) -> Path:
    """The destination as a path, before any work is done for it.

    Raises MissingExtra where packages are missing, and ConversionError where the folder above is, or something is there
    that may not be replaced.
    """
    require("--triton", *ONNX_PACKAGES, extra="onnx")
    return check_place(typed_path(destination), overwrite=overwrite, own=_OWN)


def write_repository(
    weights: Weights, destination: str | Path, *, dtype: str = "float32", overwrite: bool = False
) -> Comparison:
    """Writes a folder that `tritonserver --model-repository` reads, and runs its steps in ONNX Runtime against the
    PyTorch twin on photographs of several sizes. It is kept only if they agree.

    Args:
        dtype: float32 or float16, of what the classifier computes.

    Raises ConversionError: see `check_repository`; the model is no classifier of RGB pictures, or its evaluation pads
    them; or the disk is full, or writing fails otherwise.
    """
    from convert.export.onnx_graph import onnx_graph
    from convert.export.onnx_preprocess import preprocessing

    path = check_repository(destination, overwrite=overwrite)
    config = weights.config
    if not config.num_classes:
        raise ConversionError("--triton serves classifiers, and the weights have no head")
    before = preprocessing(config, output=_IMAGES)
    classifier = _with_probabilities(onnx_graph(weights, dtype), config.num_classes)
    height, width = config.image_size
    with replacing(path) as new:
        _write(new, _PREPROCESS, _preprocess_config(height, width), before)
        _write(new, _CLASSIFY, _classify_config(height, width, config.num_classes), classifier)
        _write(new, MODEL, _ensemble_config(config.num_classes), None)
        names = weights.class_names or tuple(map(str, range(config.num_classes)))
        lines = "".join(f"{' '.join(name.split())}\n" for name in names)
        write_bytes(new / MODEL / "labels.txt", lines.encode())
        comparison = _compared(new, weights, dtype)
        if not comparison.passed:
            import shutil

            shutil.rmtree(new)
    return comparison


def _write(folder: Path, name: str, config: str, model: "onnx.ModelProto | None") -> None:
    version = folder / name / VERSION
    version.mkdir(parents=True)
    write_bytes(folder / name / _CONFIG, config.encode())
    if model is None:
        write_bytes(version / ".keep")  # Triton wants the folder, and object stores forget empty ones
    else:
        write_bytes(version / "model.onnx", model.SerializeToString())


def _with_probabilities(model: "onnx.ModelProto", classes: int) -> "onnx.ModelProto":
    """The graph with probabilities and the order of the classes in place of logits."""
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    graph.initializer.append(numpy_helper.from_array(np.array([classes], np.int64), "all_classes"))
    graph.node.append(helper.make_node("Softmax", ["logits"], [PROBABILITIES], axis=-1))
    graph.node.append(helper.make_node("TopK", [PROBABILITIES, "all_classes"], ["sorted_probabilities", CLASSES]))
    del graph.output[:]
    kinds = ((PROBABILITIES, TensorProto.FLOAT), (CLASSES, TensorProto.INT64))
    graph.output.extend(helper.make_tensor_value_info(name, kind, ["batch", classes]) for name, kind in kinds)
    return model


def _compared(folder: Path, weights: Weights, dtype: str) -> Comparison:
    """The steps in a row, on pictures of three sizes, beside the twin on what `preprocess_image` makes of them."""
    import onnxruntime

    from convert.export.onnx_graph import run_torch

    steps = [
        onnxruntime.InferenceSession(folder / name / VERSION / "model.onnx", providers=["CPUExecutionProvider"])
        for name in (_PREPROCESS, _CLASSIFY)
    ]
    source, got, expected = run_torch(weights), [], []
    for pictures, images in picture_batches(weights.config):
        (normalised,) = steps[0].run([_IMAGES], {INPUT: pictures})
        probabilities, classes = steps[1].run([PROBABILITIES, CLASSES], {_IMAGES: normalised})
        if not (np.take_along_axis(probabilities, classes, 1) == -np.sort(-probabilities, 1)).all():
            raise ConversionError("the repository's classes are not in the order of their probabilities")
        logits = source(images)
        powers = np.exp(logits - logits.max(1, keepdims=True))
        got.append(probabilities)
        expected.append(powers / powers.sum(1, keepdims=True))
    got, expected = np.concatenate(got), np.concatenate(expected)
    return compare(got, expected, dtype, images=f"{len(got)} pictures of 3 sizes", outputs="probabilities")


# --- the settings, as Triton reads them ---


def _tensors(kind: str, *tensors: tuple[str, str, Sequence[int]], more: str = "") -> str:
    entries = (f'  {{ name: "{name}" data_type: {of} dims: {list(dims)}{more} }}' for name, of, dims in tensors)
    return f"{kind} [\n" + ",\n".join(entries) + "\n]\n"


def _preprocess_config(height: int, width: int) -> str:
    return (
        f'name: "{_PREPROCESS}"\nbackend: "onnxruntime"\nmax_batch_size: 0\n'
        + _tensors("input", (INPUT, "TYPE_UINT8", [-1, -1, -1, 3]))
        + _tensors("output", (_IMAGES, "TYPE_FP32", [-1, 3, height, width]))
    )


def _classify_config(height: int, width: int, classes: int) -> str:
    return (
        f'name: "{_CLASSIFY}"\nbackend: "onnxruntime"\nmax_batch_size: {_PREFERRED[-1]}\n'
        + _tensors("input", (_IMAGES, "TYPE_FP32", [3, height, width]))
        + _tensors("output", (PROBABILITIES, "TYPE_FP32", [classes]), (CLASSES, "TYPE_INT64", [classes]))
        + f"""dynamic_batching {{
  preferred_batch_size: {list(_PREFERRED)}
  max_queue_delay_microseconds: {_DELAY}
  default_queue_policy {{
    timeout_action: REJECT
    default_timeout_microseconds: {_TIMEOUT}
    allow_timeout_override: true
    max_queue_size: {_QUEUE}
  }}
}}
"""
    )


def _ensemble_config(classes: int) -> str:
    labelled = ' label_filename: "labels.txt"'
    outputs = _tensors("output", (PROBABILITIES, "TYPE_FP32", [-1, classes]), more=labelled)
    more = _tensors("output", (CLASSES, "TYPE_INT64", [-1, classes]))
    return (
        f'name: "{MODEL}"\nplatform: "ensemble"\nmax_batch_size: 0\n'
        + _tensors("input", (INPUT, "TYPE_UINT8", [-1, -1, -1, 3]))
        + outputs
        + more
        + f"""ensemble_scheduling {{
  step [
    {{
      model_name: "{_PREPROCESS}"
      model_version: -1
      input_map {{ key: "{INPUT}" value: "{INPUT}" }}
      output_map {{ key: "{_IMAGES}" value: "{_IMAGES}" }}
    }},
    {{
      model_name: "{_CLASSIFY}"
      model_version: -1
      input_map {{ key: "{_IMAGES}" value: "{_IMAGES}" }}
      output_map {{ key: "{PROBABILITIES}" value: "{PROBABILITIES}" }}
      output_map {{ key: "{CLASSES}" value: "{CLASSES}" }}
    }}
  ]
}}
"""
    )
