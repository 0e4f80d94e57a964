"""Whole models as files that run without this library: written, run against their source, and kept if they agree."""

import importlib.util
from pathlib import Path

from convert.check_export import Comparison, compare
from convert.destinations import EXPORTED, check_place, replacing, require_space, write_bytes
from convert.errors import ConversionError
from convert.tensors import DTYPES
from convert.weights import Weights

# the largest difference of logits, relative to the largest logit, by the dtype that the file computes in
BOUNDS = {"float32": 1e-4, "float16": 0.03}


def check_export(destination: str | Path, dtype: str, *, overwrite: bool = False) -> Path:
    """The destination as a path, before any work is done for it.

    Raises:
        ConversionError: the ending or dtype is none that can be exported, packages are missing, the folder is, or
            something is there that may not be replaced.
    """
    path = Path(destination).expanduser()
    if path.suffix not in EXPORTED:
        raise ConversionError(f"{path}: unknown ending {path.suffix!r}; exported: {', '.join(EXPORTED)}")
    if dtype not in BOUNDS:
        raise ConversionError(f"{path}: exported graphs compute in {' or '.join(BOUNDS)}, not in {dtype}")
    from convert.onnx_export import PACKAGES

    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise ConversionError(f"{path} needs {', '.join(missing)}: pip install 'crossvit-jax[onnx]'")
    return check_place(path, overwrite=overwrite)


def export(
    weights: Weights, destination: str | Path, *, dtype: str = "float32", overwrite: bool = False
) -> tuple[Path, Comparison]:
    """Writes `.onnx` (see `onnx_export.onnx_graph`) and runs the file against its source in float32.

    The file is written under a temporary name and only kept if they agree.

    Args:
        weights: in any dtype.
        dtype: that the file computes in, "float32" or "float16".

    Returns:
        The path, and how far the file is from its source; nothing was written if that has not `passed`.

    Raises:
        ConversionError: see `check_export`; or the disk is full, or writing fails otherwise.
    """
    from convert.onnx_export import onnx_graph, run_onnx, run_torch

    path = check_export(destination, dtype, overwrite=overwrite)
    require_space(weights.astype(DTYPES[dtype]), path)
    with replacing(path) as new:
        write_bytes(new, onnx_graph(weights, dtype).SerializeToString())
        comparison = compare(run_onnx(new), run_torch(weights), weights.config, BOUNDS[dtype])
        if not comparison.passed:
            new.unlink()
    return path, comparison
