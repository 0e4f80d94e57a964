"""Whole models as files that run without this library: written, run against their source, and kept if they agree."""

import importlib.util
from pathlib import Path

from convert.errors import ConversionError
from convert.export.compare import Comparison, Run, compare, image_batches, picture_batches
from convert.files import check_place, replacing, typed_path, write_bytes
from convert.formats.write import EXPORTED, require_space
from convert.tensors import DTYPES
from convert.weights import Weights

# the largest difference of logits, relative to the largest logit, by the dtype that the file computes in
BOUNDS = {"float32": 1e-4, "float16": 0.03, "bfloat16": 0.2}

# onnxruntime has no bfloat16 on CPUs: nobody could check such a file
_DTYPES = {".onnx": ("float32", "float16"), ".stablehlo": ("float32", "float16", "bfloat16")}

_PACKAGES = {".onnx": ("onnx", "onnxruntime", "onnxscript"), ".stablehlo": ()}  # those that are an extra


def check_export(destination: str | Path, dtype: str, *, preprocess: bool = False, overwrite: bool = False) -> Path:
    """The destination as a path, before any work is done for it.

    Raises:
        ConversionError: the ending or dtype is none that can be exported, or preprocessing is not with that ending;
            packages are missing, the folder is, or something is there that may not be replaced.
    """
    path = typed_path(destination)
    if path.suffix not in EXPORTED:
        raise ConversionError(f"{path}: unknown ending {path.suffix!r}; exported: {', '.join(EXPORTED)}")
    if preprocess and path.suffix != ".onnx":
        raise ConversionError(f"{path}: --preprocess is for .onnx files")
    dtypes = _DTYPES[path.suffix]
    if dtype not in dtypes:
        raise ConversionError(f"{path}: {path.suffix} files compute in {' or '.join(dtypes)}, not in {dtype}")
    missing = [package for package in _PACKAGES[path.suffix] if importlib.util.find_spec(package) is None]
    if missing:
        raise ConversionError(f"{path} needs {', '.join(missing)}: pip install 'crossvit-jax[onnx]'")
    return check_place(path, overwrite=overwrite)


def export(
    weights: Weights,
    destination: str | Path,
    *,
    dtype: str = "float32",
    preprocess: bool = False,
    overwrite: bool = False,
) -> tuple[Path, Comparison]:
    """Writes `.onnx` (see `onnx_export.onnx_graph`) or `.stablehlo` (see `stablehlo.stablehlo_program`), and runs the
    file against its source in float32: the PyTorch twin or the Flax model.

    The file is written under a temporary name and only kept if they agree.

    Args:
        weights: in any dtype.
        dtype: that the file computes in, "float32", "float16" or, `.stablehlo` only, "bfloat16".
        preprocess: `.onnx` only: the file takes pictures of any size, see `onnx_preprocess.with_preprocessing`, and its
            source is run on what evaluation makes of them.

    Returns:
        The path, and how far the file is from its source; nothing was written if that has not `passed`.

    Raises:
        ConversionError: see `check_export` and `onnx_preprocess.check_pictures`; or the disk is full, or writing fails
            otherwise.
    """
    path = check_export(destination, dtype, preprocess=preprocess, overwrite=overwrite)
    if preprocess:
        from convert.export.onnx_preprocess import check_pictures

        check_pictures(weights.config)
    batches = picture_batches(weights.config) if preprocess else image_batches(weights.config)
    require_space(weights.astype(DTYPES[dtype]), path)
    with replacing(path) as new:
        if path.suffix == ".onnx":
            run, source = _export_onnx(weights, dtype, new, preprocess=preprocess)
        else:
            run, source = _export_stablehlo(weights, dtype, new)
        comparison = compare(run, source, batches, BOUNDS[dtype])
        if not comparison.passed:
            new.unlink()
    return path, comparison


def _export_onnx(weights: Weights, dtype: str, path: Path, *, preprocess: bool) -> tuple[Run, Run]:
    """Writes the file; returns how it and its source are run."""
    from convert.export.onnx_graph import onnx_graph, run_onnx, run_torch

    graph = onnx_graph(weights, dtype)
    if preprocess:
        from convert.export.onnx_preprocess import with_preprocessing

        graph = with_preprocessing(graph, weights.config)
    write_bytes(path, graph.SerializeToString())
    return run_onnx(path), run_torch(weights)


def _export_stablehlo(weights: Weights, dtype: str, path: Path) -> tuple[Run, Run]:
    """Writes the file; returns how it and its source are run."""
    from convert.export.stablehlo import run_source, run_stablehlo, stablehlo_program

    write_bytes(path, stablehlo_program(weights, dtype))
    return run_stablehlo(path), run_source(weights)
