"""What TensorRT's ONNX parser reads, as far as graphs of this library use it. No engine is built here."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx

# From the support matrix of TensorRT 10.1's parser (github.com/onnx/onnx-tensorrt, docs/operators.md): its opsets, and
# those of its operators that a transformer may need. It has `Resize` too, but not the cubic mode or antialiasing; of
# quantised tensors we write only int8 with zero points 0; float64 is no type of its.
OPSETS = range(9, 21)
_OPERATORS = """
    Add Cast Concat Constant Conv DequantizeLinear Div Erf Expand Flatten Gather Gelu Gemm Identity LayerNormalization
    MatMul Mul Pow QuantizeLinear ReduceMean Relu Reshape Resize Shape Slice Softmax Split Sqrt Squeeze Sub Sum Tanh
    Transpose Unsqueeze Where
"""
OPERATORS = frozenset(_OPERATORS.split())
RESIZE_MODES = ("nearest", "linear")


def unsupported(model: "onnx.ModelProto") -> list[str]:
    """What TensorRT would refuse in a graph, a line for each kind; empty where it takes everything."""
    import onnx
    from onnx import TensorProto, numpy_helper

    faults = [
        f"opset {opset.version} of {opset.domain or 'ai.onnx'}"
        for opset in model.opset_import
        if opset.domain not in ("", "ai.onnx") or opset.version not in OPSETS
    ]
    faults += [f"local function {function.name}" for function in model.functions]
    graph = model.graph
    values = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            value = _value(node)
            if value is None:
                faults.append(f"Constant with {node.attribute[0].name}")
            else:
                values[node.output[0]] = value
    kinds = {name: tensor.data_type for name, tensor in values.items()}
    for value in (*graph.input, *graph.value_info, *graph.output):
        kinds[value.name] = value.type.tensor_type.elem_type
    for node in graph.node:
        attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATORS:
            faults.append(f"operator {node.domain or 'ai.onnx'}.{node.op_type}")
        if node.op_type == "Resize":
            mode = attributes.get("mode", b"nearest").decode()
            if mode not in RESIZE_MODES or attributes.get("antialias"):
                faults.append(f"Resize with mode {mode}{' and antialiasing' if attributes.get('antialias') else ''}")
        if node.op_type == "Cast":
            kinds[node.output[0]] = attributes["to"]
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero_point = node.input[2] if len(node.input) > 2 else ""
            if node.op_type == "QuantizeLinear":
                # without either, ONNX means uint8
                kind = kinds.get(zero_point) or attributes.get("output_dtype") or TensorProto.UINT8
                kinds[node.output[0]] = kind
            else:
                kind = kinds.get(node.input[0], TensorProto.UNDEFINED)
            if zero_point and (zero_point not in values or numpy_helper.to_array(values[zero_point]).any()):
                faults.append(f"{node.op_type} with a zero point other than 0")
            elif kind != TensorProto.INT8:
                way = "to" if node.op_type == "QuantizeLinear" else "from"
                faults.append(f"{node.op_type} {way} {TensorProto.DataType.Name(kind).lower()}")
    if TensorProto.DOUBLE in kinds.values():
        faults.append("tensors of float64")
    return list(dict.fromkeys(faults))


def _value(constant: "onnx.NodeProto") -> "onnx.TensorProto | None":
    """What a `Constant` holds; None for strings and sparse tensors, which TensorRT does not take."""
    import onnx

    (attribute,) = constant.attribute
    value = onnx.helper.get_attribute_value(attribute)
    if attribute.name == "value":
        return value
    dtypes = {"value_float": "float32", "value_floats": "float32", "value_int": "int64", "value_ints": "int64"}
    if attribute.name not in dtypes:
        return None
    return onnx.numpy_helper.from_array(np.array(value, dtypes[attribute.name]))
