"""The sides of the deployment benchmark: each runs a file as its users would, on all cores that it may use.

Images are given as each of them takes them, and lie in memory; every call is waited for before the next one starts.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float32

from benchmarks.task import DeployTask, Images, Program, jax_facts, repeated, usable_cores

Logits = Float32[np.ndarray, "batch classes"]
Loaded = tuple[Callable[[Images], Any], Callable[[Any], Logits], dict[str, str]]  # for images, from these, facts


def load(task: DeployTask, side: str) -> Program:
    """The program of a form. Imports what the form runs in."""
    form = task.forms[side]
    prepare, call, facts = _LOADERS[form.runs_in](form.file)

    def check() -> dict[str, Logits]:
        return {"logits": np.concatenate([call(prepare(batch)) for batch in task.batches()])[: task.checked]}

    images = prepare(next(task.batches()))
    return Program(check, repeated(lambda: call(images)), facts)


def _torch_eager(file: str) -> Loaded:
    """The PyTorch twin in float32."""
    import torch

    from convert import load_torch

    model = load_torch(file)
    facts = {"torch": torch.__version__, "torch threads": str(torch.get_num_threads())}
    call = torch.inference_mode()(lambda images: model(images).numpy())
    return lambda batch: torch.from_numpy(_channels_first(batch)), call, facts


def _onnx(file: str) -> Loaded:
    """An ONNX file in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = usable_cores()  # by itself it takes one for two hyperthreads, unlike torch and XLA
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    facts = {"onnxruntime": onnxruntime.__version__, "onnxruntime threads": str(options.intra_op_num_threads)}
    return _channels_first, lambda images: session.run(None, {"images": images})[0], facts


def _stablehlo(file: str) -> Loaded:
    """A StableHLO program in jax."""
    import jax
    from jax import export

    with open(file, "rb") as opened:
        run = jax.jit(export.deserialize(bytearray(opened.read())).call)
    return jax.numpy.asarray, lambda images: np.asarray(run(images)), jax_facts()


def _qwix(file: str) -> Loaded:
    """Weights rounded to int8 and multiplied as integers, as `python -m train.evaluate --quantize int8` has it."""
    import importlib.metadata

    import jax

    from benchmarks.sides.flax import jitted
    from convert import load_flax
    from train.devices.process import keep_freed_memory
    from train.optim.quantize import quantised

    keep_freed_memory()  # as train.evaluate does
    run = jitted(quantised(load_flax(file), "int8"))
    facts = jax_facts() | {"qwix": importlib.metadata.version("qwix")}
    return jax.numpy.asarray, lambda images: np.asarray(run(images)), facts


def _channels_first(batch: Images) -> Float32[np.ndarray, "batch 3 height width"]:
    return np.ascontiguousarray(batch.transpose(0, 3, 1, 2))


_LOADERS = {"torch": _torch_eager, "onnxruntime": _onnx, "stablehlo": _stablehlo, "qwix": _qwix}  # by `Form.runs_in`
