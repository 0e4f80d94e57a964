"""What TensorRT's ONNX parser reads, as far as graphs of this library use it. No engine is built here."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

# From the support matrix of TensorRT 10.1's parser (github.com/onnx/onnx-tensorrt, docs/operators.md): its opsets, and
# those of its operators that a transformer may need. It has `Resize` too, but not the cubic mode or antialiasing.
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
    from onnx import numpy_helper

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
            values[node.output[0]] = onnx.helper.get_node_attr_value(node, "value")
    for node in graph.node:
        attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATORS:
            faults.append(f"operator {node.domain or 'ai.onnx'}.{node.op_type}")
        if node.op_type == "Resize":
            mode = attributes.get("mode", b"nearest").decode()
            if mode not in RESIZE_MODES or attributes.get("antialias"):
                faults.append(f"Resize with mode {mode}{' and antialiasing' if attributes.get('antialias') else ''}")
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) > 2 and node.input[2]:
            zero_point = values.get(node.input[2])
            if zero_point is None or numpy_helper.to_array(zero_point).any():
                faults.append(f"{node.op_type} with a zero point other than 0")
            elif zero_point.data_type == onnx.TensorProto.UINT8:
                faults.append(f"{node.op_type} to uint8")
    return list(dict.fromkeys(faults))
