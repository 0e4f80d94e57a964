"""`python docs/layer_fusion.py`: what ONNX Runtime, and XLA on this machine, make of Ti's operations. See deploy.md."""

import re
import tempfile
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import onnx
import onnxruntime
from flax import nnx

from convert.export.onnx_graph import onnx_graph
from convert.export.onnx_int8 import quantize_dynamic
from convert.files import write_bytes
from convert.tree import flatten
from convert.weights import Weights
from crossvit_jax import CrossViT, create_model
from train.cost.hlo import entry, instructions

# of ONNX Runtime, which calls them ORT_…
LEVELS = {"disabled": "DISABLE_ALL", "basic": "ENABLE_BASIC", "extended": "ENABLE_EXTENDED", "all": "ENABLE_ALL"}
NO_KERNEL = ("parameter", "constant", "bitcast", "tuple", "get-tuple-element")  # of XLA: nothing runs for them


def onnx_nodes(path: Path, level: str) -> Counter[str]:
    """How many nodes of each kind ONNX Runtime runs of a file at one of `LEVELS`; its own kinds carry their domain."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_{LEVELS[level]}")
    options.log_severity_level = 3  # it warns that the saved file is for this machine
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder, "optimised.onnx"))
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        graph = onnx.load(options.optimized_model_filepath).graph
    return Counter(f"{node.domain}.{node.op_type}" if node.domain else node.op_type for node in graph.node)


def xla_kernels(model: CrossViT, batch: int) -> tuple[int, Counter[str]]:
    """How many operations are traced of a forward pass, and how many kernels of each kind XLA makes of them.

    Of XLA's kinds, `fusion kLoop` is a loop over elements, and `fusion kCustom` what a library computes on CPUs.
    """
    graphdef, params = nnx.split(model)
    images = jax.ShapeDtypeStruct((batch, *model.config.image_size, model.config.in_chans), jnp.float32)
    lowered = jax.jit(lambda params, images: nnx.merge(graphdef, params)(images)).lower(params, images)
    hlo = lowered.compile().as_text()
    first, kinds = entry(hlo), Counter()
    for computation, _, rest in instructions(hlo):
        operation = re.search(r" ([a-z][a-z-]*)\(", rest)[1]
        if computation == first and operation not in NO_KERNEL:
            kinds[" ".join([operation, *re.findall(r"\bkind=(k\w+)", rest)])] += 1
    return len(re.findall(r" = \"?(?:stablehlo|chlo)\.(?!constant)", lowered.as_text())), kinds


def onnx_rows(model: CrossViT) -> list[list[str]]:
    """Nodes of the float32 and the dynamic int8 file at each level, the first row with the titles."""
    rows = [["", *LEVELS, "its own kinds, at all"]]
    with tempfile.TemporaryDirectory() as folder:
        files = {"float32": Path(folder, "float32.onnx"), "dynamic int8": Path(folder, "int8.onnx")}
        graph = onnx_graph(Weights(config=model.config, tensors=flatten(model)))
        write_bytes(files["float32"], graph.SerializeToString())
        quantize_dynamic(*files.values())
        for name, file in files.items():
            counts = [onnx_nodes(file, level) for level in LEVELS]
            own = Counter({kind.split(".")[-1]: count for kind, count in counts[-1].items() if "." in kind})
            rows.append([name, *(f"{count.total():,}" for count in counts), listed(own)])
    return rows


def xla_rows(model: CrossViT) -> list[list[str]]:
    """Kernels at two batch sizes, the first row with the titles."""
    rows = [["", "operations traced", "kernels", "of these"]]
    for batch in (1, 8):
        traced, kinds = xla_kernels(model, batch)
        rows.append([f"batch {batch}", f"{traced:,}", f"{kinds.total():,}", listed(kinds)])
    return rows


def listed(kinds: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())


if __name__ == "__main__":
    model = create_model("ti", rngs=nnx.Rngs(0))
    model.eval()
    for titles, *rows in (onnx_rows(model), xla_rows(model)):
        for cells in (titles, ["---"] * len(titles), *rows):
            print(f"| {' | '.join(cells)} |")
        print()
