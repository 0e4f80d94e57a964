"""The command `python -m benchmarks.fusion`: what ONNX Runtime and XLA make of a model's operations, as Markdown."""

import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.command import parser_of
from benchmarks.result import markdown_table
from convert.command_line import leave, run
from convert.errors import require
from convert.export.compare import ONNX_PACKAGES
from convert.files import write_bytes
from convert.tree import flatten
from convert.weights import Weights
from crossvit_jax import CrossViT, create_model
from crossvit_jax.config import VARIANTS
from train.cost.hlo import entry, instructions

# of ONNX Runtime, which calls them ORT_…
LEVELS = {"disabled": "DISABLE_ALL", "basic": "ENABLE_BASIC", "extended": "ENABLE_EXTENDED", "all": "ENABLE_ALL"}

_NO_KERNEL = ("parameter", "constant", "bitcast", "tuple", "get-tuple-element")  # of XLA: nothing runs for them


def onnx_nodes(path: Path, level: str) -> Counter[str]:
    """How many nodes of each kind ONNX Runtime runs of a file at one of `LEVELS`; its own kinds carry their domain."""
    import onnx
    import onnxruntime

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
        if computation == first and operation not in _NO_KERNEL:
            kinds[" ".join([operation, *re.findall(r"\bkind=(k\w+)", rest)])] += 1
    return len(re.findall(r" = \"?(?:stablehlo|chlo)\.(?!constant)", lowered.as_text())), kinds


def table(model: CrossViT) -> str:
    """Node counts of the float32 and the dynamic int8 ONNX file, and kernel counts of XLA on this machine's device."""
    from convert.export.onnx_graph import onnx_graph
    from convert.export.onnx_int8 import quantize_dynamic

    nodes, kernels = [], []
    with tempfile.TemporaryDirectory() as folder:
        exported, int8 = Path(folder, "float32.onnx"), Path(folder, "int8.onnx")
        graph = onnx_graph(Weights(config=model.config, tensors=flatten(model)))
        write_bytes(exported, graph.SerializeToString())
        quantize_dynamic(exported, int8)
        for name, path in (("float32", exported), ("dynamic int8", int8)):
            counts = [onnx_nodes(path, level) for level in LEVELS]
            own = Counter({kind.split(".")[-1]: count for kind, count in counts[-1].items() if "." in kind})
            nodes.append([name, *(f"{count.total():,}" for count in counts), _listed(own)])
    for batch in (1, 8):
        traced, kinds = xla_kernels(model, batch)
        kernels.append([f"batch {batch}", f"{traced:,}", f"{kinds.total():,}", _listed(kinds)])
    titles = [f"XLA, {jax.default_backend()}", "operations traced", "kernels", "of these"]
    lines = markdown_table(["ONNX Runtime", *LEVELS, "its own kinds, at all"], nodes)
    return "\n".join([*lines, "", *markdown_table(titles, kernels)])


def _listed(kinds: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables; returns the exit status: 0 done; 2 wrong flags, or packages are missing."""
    parser = parser_of("fusion", "Count what ONNX Runtime and XLA run of a model.", epilog="")
    parser.add_argument("--variant", choices=VARIANTS, default="ti", help="default: ti")
    args = parser.parse_args(argv)

    def tell() -> int:
        require("the ONNX forms", *ONNX_PACKAGES, verb="need")
        model = create_model(args.variant, rngs=nnx.Rngs(0))
        model.eval()
        print(table(model))
        return 0

    return run(parser.prog, tell, failure=1)


if __name__ == "__main__":
    leave(main())
