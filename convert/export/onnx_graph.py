"""The PyTorch twin as an ONNX graph."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from convert import metadata
from convert.export.compare import Run
from convert.models import torch_model
from convert.weights import Weights
from crossvit_jax.config import CrossViTConfig, DenseConfig
from crossvit_jax.resize import bicubic_matrix

if TYPE_CHECKING:
    import onnx
    import torch

OPSET = 20  # the newest that TensorRT 10.1 reads, and the first with Gelu


def onnx_graph(weights: Weights, dtype: str = "float32") -> "onnx.ModelProto":
    """The model as an ONNX graph that computes in `dtype`, with everything in it that a caller has to know.

    It takes `images` (batch, channels, height, width), ImageNet-normalised, of exactly the model's size, and returns
    `logits` (batch, classes), or `features` (batch, widths) without a head; of a segmenter `logits` (batch, classes,
    height, width); of a detector its raw outputs, see `CrossViTDetector`. All are float32 whatever `dtype` is, and the
    batch may have any size. The metadata holds strings, JSON where they are no plain text.

    Args:
        dtype: "float32" or "float16": of the parameters and of what is computed; softmax, the statistics of norms, the
            resize between the branches and the head stay in float32.
    """
    import torch

    config = weights.config
    model = torch_model(weights, param_dtype=getattr(torch, dtype))
    program = torch.onnx.export(
        model,
        (torch.zeros(2, config.in_chans, *config.image_size),),
        dynamo=True,
        opset_version=OPSET,
        input_names=["images"],
        output_names=_output_names(config),
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        custom_translation_table={torch.ops.aten.upsample_bicubic2d.vec: _resize_by_matrices},
        verbose=False,
    )
    graph = program.model_proto
    _remove_traces(graph)
    for key, value in (metadata.summary(weights) | {"dtype": dtype}).items():
        graph.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
    return graph


def _output_names(config: CrossViTConfig | DenseConfig) -> list[str]:
    if config.task == "detection":
        return ["cls_logits", "bbox_regression", "bbox_ctrness"]
    return ["logits" if config.num_classes else "features"]


def run_torch(weights: Weights) -> Run:
    """The twin in float32, as a function from images (batch, height, width, channels) to its outputs."""
    return run_twin(torch_model(weights))


def run_twin(model: "torch.nn.Module") -> Run:
    """A twin, as a function from images (batch, height, width, channels) to its outputs."""
    import torch

    def run(images):
        with torch.inference_mode():
            outputs = model(torch.from_numpy(images).permute(0, 3, 1, 2))
        if isinstance(outputs, dict):
            return {name: output.numpy() for name, output in outputs.items()}
        return outputs.numpy()

    return run


def run_onnx(path: Path, *, to_the_letter: bool = False) -> Run:
    """The graph in a file, as a function from images (batch, height, width, channels) to its outputs: those of a
    detector by name.

    A graph with preprocessing takes pictures in their place, see `onnx_preprocess`.

    Args:
        to_the_letter: operator by operator, as it is written.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if to_the_letter:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (takes,), names = session.get_inputs(), [output.name for output in session.get_outputs()]

    def run(images):
        given = images.transpose(0, 3, 1, 2) if takes.name == "images" else images
        outputs = session.run(None, {takes.name: np.ascontiguousarray(given)})
        return outputs[0] if len(names) == 1 else dict(zip(names, outputs, strict=True))

    return run


def _resize_by_matrices(images, output_size, align_corners, scale_factors=None):
    """torch's bicubic resize as two products with constant matrices, in place of ONNX's `Resize`.

    TensorRT has no cubic `Resize`, and onnxruntime's takes a third of the time of a whole Ti.
    """
    import onnx
    from onnxscript import opset20 as op

    half = images.dtype.name == "FLOAT16"
    sizes = tuple(zip(images.shape[2:], output_size, strict=True))
    tensors = {size: np.ascontiguousarray(bicubic_matrix(*size, np.dtype("float32"))) for size in sizes}
    matrices = {size: op.Constant(value=onnx.numpy_helper.from_array(tensor)) for size, tensor in tensors.items()}
    rows, columns = (matrices[size] for size in sizes)
    if half:
        images = op.Cast(images, to=1)
    # of a square image both are one matrix, kept once: it is a hundredth of an int8 file
    resized = op.MatMul(rows, op.MatMul(images, op.Transpose(columns, perm=[1, 0])))
    return op.Cast(resized, to=10) if half else resized


def _remove_traces(graph: "onnx.ModelProto") -> None:
    """Removes what the exporter notes at each node: stack traces with paths of this machine, larger than the graph."""
    inner = graph.graph
    for part in (inner, *inner.node, *inner.initializer, *inner.input, *inner.output, *inner.value_info):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
