"""Writes weights in the format that the destination's ending names: whole, or not at all."""

import functools
import io
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from convert import metadata
from convert.errors import ConversionError, require
from convert.files import NotWritten, check_place, replacing, typed_path, write_bytes
from convert.formats.hf_folder import HF_FILES, check_for_timm, write_hf
from convert.formats.orbax_folder import ORBAX_FILES, write_orbax
from convert.tensors import as_tensor
from convert.tree import nest, to_flax_paths
from convert.weights import Weights

EXPORTED = (".onnx", ".stablehlo", ".pt")  # endings of whole models, see convert.export.export


def check_destination(destination: str | Path, *, overwrite: bool = False) -> Path:
    """The destination as a path, before any work is done for it.

    Raises:
        ConversionError: an unknown ending, a missing folder, or something is there that may not be replaced.
        MissingExtra: the format is torch's, which is not installed.
    """
    path = typed_path(destination)
    writer = _writer(path)
    if writer is _write_pth:
        require(str(path), "torch")
    return check_place(path, overwrite=overwrite, own=_FOLDERS.get(writer))


def write(weights: Weights, destination: str | Path, *, overwrite: bool = False) -> Path:
    """Writes `.safetensors` or `.pth` (both as timm loads them), `.flax.safetensors`, a folder `.hf` as repositories of
    the hub are, or an Orbax folder.

    All but `.pth` carry the settings and class names as metadata. The work happens under a temporary name beside the
    destination, which is renamed at the end; when anything fails, it is removed.

    Returns:
        The path written.

    Raises:
        ConversionError: see `check_destination` and `check_writable`; or the disk is full, or writing fails otherwise.
    """
    path = check_destination(destination, overwrite=overwrite)
    check_writable(weights, path)
    require_space(weights, path)
    with replacing(path) as new:
        _writer(path)(weights, new)
    return path


def check_writable(weights: Weights, path: Path) -> None:
    """Raises ConversionError where the format that a path's ending names has no place for such weights."""
    if _writer(path) is write_hf:
        check_for_timm(weights.config)


def written_for_timm(path: Path) -> bool:
    """Whether timm loads what is written under this name."""
    return _writer(path) is not _write_orbax and not path.name.endswith(".flax.safetensors")


def _writer(path: Path) -> Callable[[Weights, Path], None]:
    for ending, writer in _WRITERS.items():
        if path.name.endswith(ending):
            return writer
    if path.suffix in EXPORTED:
        raise ConversionError(f"{path}: {path.suffix} holds no weights to load again; python -m convert exports it")
    if path.suffix or not path.name:
        known = ", ".join((*_WRITERS, *EXPORTED))
        raise ConversionError(f"{path}: unknown ending {path.suffix!r}; known: {known}, none for Orbax")
    return _write_orbax


def _write_safetensors(weights: Weights, path: Path, layout: str = "pt") -> None:
    arrays = to_flax_paths(weights.tensors) if layout == "flax" else weights.tensors
    description = json.dumps(metadata.describe_weights(weights))
    origin = {} if weights.origin is None else {metadata.ORIGIN: weights.origin}
    about = {"format": layout, metadata.KEY: description, **origin}
    write_bytes(path, *_safetensors(arrays, metadata.with_digest(arrays, about)))


def _safetensors(arrays: Mapping[str, np.ndarray], about: dict[str, str]) -> Iterator[bytes | memoryview]:
    """The parts of a safetensors file: the length of its header, the header, and each array.

    The library's own `save` writes `about` in an order of chance, and has two copies of all weights in memory.
    """
    # as the library orders them: the larger types first, so that all lie at multiples of their size
    ordered = sorted(arrays.items(), key=lambda entry: (-entry[1].dtype.itemsize, entry[1].dtype.name, entry[0]))
    header, end = {"__metadata__": about}, 0
    for name, array in ordered:
        start, end = end, end + array.nbytes
        dtype = array.dtype.name.replace("bfloat", "BF").replace("float", "F")  # F32, BF16
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for _, array in ordered:
        yield memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))  # little-endian, as jax's machines are


def _write_pth(weights: Weights, path: Path) -> None:
    import torch

    buffer = io.BytesIO()  # torch's own file writer reports a full disk as an internal assertion
    torch.save({name: as_tensor(np.ascontiguousarray(array)) for name, array in weights.tensors.items()}, buffer)
    write_bytes(path, buffer.getbuffer())


def _write_orbax(weights: Weights, path: Path) -> None:
    description = metadata.describe_weights(weights)
    write_orbax(path, nest(weights.tensors), description)


# the longer ending comes first
_WRITERS: dict[str, Callable[[Weights, Path], None]] = {
    ".flax.safetensors": functools.partial(_write_safetensors, layout="flax"),
    ".safetensors": _write_safetensors,
    ".pth": _write_pth,
    ".hf": write_hf,
}
# those that write a folder, and what is in it
_FOLDERS: dict[Callable[[Weights, Path], None], Sequence[str]] = {write_hf: HF_FILES, _write_orbax: ORBAX_FILES}


def require_space(weights: Weights, path: Path) -> None:
    """Raises NotWritten where the disk has no room for the weights."""
    needed = sum(array.nbytes for array in weights.tensors.values())
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise NotWritten(path, f"it takes {needed:,} bytes, and the disk has {free:,} left")
