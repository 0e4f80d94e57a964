"""int8 versions of exported ONNX files, by ONNX Runtime's quantiser.

What is quantised are the layers' weights, per output channel, and what they are multiplied with. Three kinds of product
stay float: attention's scores and weighted values, which have no weights and lose most (with ONNX Runtime's own choice
half of the images get another class); and the resize, whose two constant matrices work on the pixels themselves.

For CPUs, weights take 7 of the 8 bits: processors without VNNI add pairs of products in 16 bits, which 8 bits overflow.
On such a one, an untrained Ti's error is 1.4 (static) to 1.8 times (dynamic) larger with 8; on others a fifth smaller.
What comes out of a layer stays float: only what goes into one is rounded.
"""

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float32

from convert.errors import ConversionError, MissingExtra, one_line, quiet
from convert.files import replacing, write_bytes
from crossvit_jax.extras import needs

if TYPE_CHECKING:
    import onnx

_OPERATORS = ("MatMul", "Gemm", "Conv")
_BATCH = 8  # images at once; large models' activations are kept for each
_QUANTISED = ("QuantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "QLinearMatMul", "ConvInteger")


def quantize_dynamic(source: Path, destination: Path) -> None:
    """int8 weights; activations are quantised to 8 bits as they come. Needs no images and is the best for CPUs.

    The patch embeddings' convolutions stay float.

    Args:
        source: a float32 ONNX file.
        destination: is replaced if it exists, once the new file is complete.

    Raises:
        ConversionError: onnxruntime is missing, or the file cannot be read, is not float32, or cannot be written.
    """
    model = _load(source)
    tools = _module("onnxruntime.quantization")
    with replacing(destination) as new, quiet("root"):
        tools.quantize_dynamic(
            model,
            new,
            op_types_to_quantize=["MatMul", "Gemm"],
            weight_type=tools.QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
            nodes_to_exclude=float_products(model),
        )
        _describe(new, "dynamic")


def quantize_static(
    source: Path,
    destination: Path,
    images: Float32[np.ndarray, "images channels height width"],
    *,
    target: Literal["cpu", "tensorrt"] = "cpu",
) -> None:
    """int8 weights, and activations in fixed ranges, those seen on `images`: pairs of Q and DQ around float operators.

    Args:
        source: a float32 ONNX file with an open batch size.
        destination: is replaced if it exists, once the new file is complete.
        images: normalised as for the model, and such as it will see: noise makes the ranges wrong.
        target: "cpu" quantises activations with a zero point to uint8, which is quickest there. "tensorrt" writes what
            TensorRT reads: all int8 with zero points 0, and float biases.

    Raises:
        ConversionError: onnxruntime is missing, or the file cannot be read, is not float32, does not take such images,
            or cannot be written.
    """
    if not len(images):
        raise ConversionError("static quantisation needs calibration images, and there are none")
    model = _load(source)
    _check_images(model, images, source)
    tools = _module("onnxruntime.quantization")
    for_cpu = target == "cpu"
    options: dict[str, Any] = {"OpTypesToExcludeOutputQuantization": list(_OPERATORS)}
    if not for_cpu:
        options |= {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}
    with replacing(destination) as new, quiet("root"):
        tools.quantize_static(
            model,
            new,
            _Batches(model.graph.input[0].name, images),
            quant_format=tools.QuantFormat.QDQ,
            op_types_to_quantize=list(_OPERATORS),
            activation_type=tools.QuantType.QUInt8 if for_cpu else tools.QuantType.QInt8,
            weight_type=tools.QuantType.QInt8,
            per_channel=True,
            reduce_range=for_cpu,
            nodes_to_exclude=float_products(model),
            extra_options=options,
        )
        _describe(new, f"static, for {target}")


def float_products(model: "onnx.ModelProto") -> list[str]:
    """The names of the `MatMul` nodes that no int8 file quantises: products of two activations, and the resize."""
    nodes = model.graph.node
    constants = {tensor.name for tensor in model.graph.initializer}
    constants |= {name for node in nodes if node.op_type == "Constant" for name in node.output}
    # the resize comes before the patch embeddings' convolutions, and nothing else with a constant matrix does
    pixels = {image.name for image in model.graph.input}
    names = []
    for node in nodes:  # in ONNX, nodes come after those that they depend on
        of_pixels = node.op_type not in ("Conv", "Shape") and any(name in pixels for name in node.input)
        if of_pixels:
            pixels.update(node.output)
        if node.op_type == "MatMul" and (of_pixels or not any(name in constants for name in node.input)):
            names.append(node.name)
    return names


class _Batches:
    """What ONNX Runtime's calibration asks for input: the images a few at a time, then None."""

    def __init__(self, input_name: str, images: np.ndarray):
        self._batches: Iterator[Mapping[str, np.ndarray]] = iter(
            {input_name: images[start : start + _BATCH]} for start in range(0, len(images), _BATCH)
        )

    def get_next(self) -> Mapping[str, np.ndarray] | None:
        return next(self._batches, None)


def _load(source: Path) -> "onnx.ModelProto":
    """The model, each node with a name of its own to be excluded by."""
    onnx = _module("onnx")
    try:
        model = onnx.load(source)
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf's, onnx's and the file system's
        raise ConversionError(f"{source} cannot be read as ONNX: {one_line(error)}") from None
    if any(node.op_type in _QUANTISED for node in model.graph.node):
        raise ConversionError(f"{source} is quantised already")
    kinds = {tensor.data_type for tensor in model.graph.initializer}
    kinds |= {value.type.tensor_type.elem_type for value in model.graph.input}
    half = kinds & {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
    if half:
        names = " and ".join(onnx.TensorProto.DataType.Name(kind).lower() for kind in sorted(half))
        raise ConversionError(f"{source} is {names}; int8 is made from float32")
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
    return model


def _check_images(model: "onnx.ModelProto", images: np.ndarray, source: Path) -> None:
    dims = model.graph.input[0].type.tensor_type.shape.dim
    if dims[0].HasField("dim_value"):
        raise ConversionError(f"{source} takes {dims[0].dim_value} images at a time; calibration needs any number")
    wanted, given = tuple(dim.dim_value for dim in dims[1:]), images.shape[1:]
    if given != wanted or images.dtype != np.float32:
        raise ConversionError(f"{source} takes float32 images of shape {wanted}; got {images.dtype} of {given}")


def _describe(path: Path, kind: str) -> None:
    """Says in the metadata what the file is now; the exporter's was of the float32 model."""
    onnx = _module("onnx")
    model = onnx.load(path)
    properties = {entry.key: entry.value for entry in model.metadata_props} | {"dtype": "int8", "quantization": kind}
    properties.pop("onnx.infer", None)  # a note of ONNX Runtime's to itself
    onnx.helper.set_model_props(model, properties)
    write_bytes(path, model.SerializeToString())


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtra(needs("quantising", [error.name or name], "onnx")) from None
