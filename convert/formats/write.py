"""Writes weights in the format that the destination's ending names: whole, or not at all."""

import contextlib
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from convert import metadata
from convert.errors import ConversionError, one_line
from convert.formats.orbax_folder import is_orbax, write_orbax
from convert.paths import typed_path
from convert.tensors import as_tensor
from convert.tree import nest, to_flax_paths
from convert.weights import Weights

EXPORTED = (".onnx", ".stablehlo")  # endings of whole models, see convert.export.export
_SHOWN = 32  # characters of a destination's name in that of its temporary folder


def check_destination(destination: str | Path, *, overwrite: bool = False) -> Path:
    """The destination as a path, before any work is done for it.

    Raises:
        ConversionError: an unknown ending, a missing folder, or something is there that may not be replaced.
    """
    path = typed_path(destination)
    return check_place(path, is_folder=_writer(path) is _write_orbax, overwrite=overwrite)


def check_place(path: Path, *, is_folder: bool = False, overwrite: bool = False) -> Path:
    """The path, if a file or a folder can be written there.

    Raises:
        ConversionError: a missing folder, one that cannot be written to, or something is there that may not be
            replaced.
    """
    if not path.parent.is_dir():
        raise ConversionError(f"{path}: the folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ConversionError(f"{path}: the folder {path.parent} cannot be written to")
    if not os.path.lexists(path):
        return path
    if not overwrite:
        raise ConversionError(f"{path} exists; --overwrite (overwrite=True) replaces it")
    if path.is_dir() != is_folder:
        raise ConversionError(f"{path} is a {'folder' if path.is_dir() else 'file'}, and is not replaced by the other")
    if path.is_dir() and any(path.iterdir()) and not is_orbax(path):
        raise ConversionError(f"{path} is a folder but no Orbax checkpoint, and is not replaced")
    return path


def write(weights: Weights, destination: str | Path, *, overwrite: bool = False) -> Path:
    """Writes `.safetensors` or `.pth` (both as timm loads them), `.flax.safetensors`, or an Orbax folder.

    All but `.pth` carry the settings and class names as metadata. The work happens under a temporary name beside the
    destination, which is renamed at the end; when anything fails, it is removed.

    Returns:
        The path written.

    Raises:
        ConversionError: see `check_destination`; or the disk is full, or writing fails otherwise.
    """
    path = check_destination(destination, overwrite=overwrite)
    require_space(weights, path)
    with replacing(path) as new:
        _writer(path)(weights, new)
    return path


class _NotWritten(ConversionError):
    """Knows the reason without the path: a file that is written on the way to another has a temporary one."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path} could not be written: {reason}")
        self.reason = reason


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to. What is there at the end is moved to `path`, if anything is.

    Raises:
        ConversionError: anything at all was raised while it was written.
    """
    try:
        prefix = f".{path.name[:_SHOWN]}."  # the whole name may be as long as names can be
        with tempfile.TemporaryDirectory(prefix=prefix, suffix=".partial", dir=path.parent) as partial:
            new = Path(partial, "new")
            yield new
            if new.exists():
                _move(new, path, aside=Path(partial, "replaced"))
    except Exception as error:  # besides OSError, whatever Orbax, tensorstore and exporters raise
        raise _NotWritten(path, _reason(error)) from None


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


def _write_safetensors(weights: Weights, path: Path) -> None:
    _save_safetensors(weights.tensors, weights, "pt", path)


def _write_flax_safetensors(weights: Weights, path: Path) -> None:
    _save_safetensors(to_flax_paths(weights.tensors), weights, "flax", path)


def _save_safetensors(arrays: Mapping[str, np.ndarray], weights: Weights, layout: str, path: Path) -> None:
    from safetensors.numpy import save

    description = metadata.to_json(weights.config, weights.class_names)
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    write_bytes(path, save(contiguous, metadata={"format": layout, metadata.KEY: description}))


def _write_pth(weights: Weights, path: Path) -> None:
    import torch

    buffer = io.BytesIO()  # torch's own file writer reports a full disk as an internal assertion
    torch.save({name: as_tensor(np.ascontiguousarray(array)) for name, array in weights.tensors.items()}, buffer)
    write_bytes(path, buffer.getbuffer())


def _write_orbax(weights: Weights, path: Path) -> None:
    write_orbax(path, nest(weights.tensors), metadata.describe(weights.config, weights.class_names))


# the longer ending comes first
_WRITERS = {".flax.safetensors": _write_flax_safetensors, ".safetensors": _write_safetensors, ".pth": _write_pth}


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Writes a file, and waits until the disk has it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # or after a power cut the new name may stand for an empty file


def _move(new: Path, path: Path, aside: Path) -> None:
    """Puts `new` at `path`. A folder there cannot be replaced in one step: it goes aside and comes back on failure."""
    if not path.is_dir():
        os.replace(new, path)
        return
    path.rename(aside)
    try:
        new.rename(path)
    except BaseException:
        aside.rename(path)
        raise


def require_space(weights: Weights, path: Path) -> None:
    """Raises ConversionError where the disk has no room for the weights."""
    needed = sum(array.nbytes for array in weights.tensors.values())
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise ConversionError(f"{path} could not be written: it takes {needed:,} bytes, and the disk has {free:,} left")


def _reason(error: Exception) -> str:
    if isinstance(error, _NotWritten):
        return error.reason
    if "No space left on device" in str(error):  # also in the middle of tensorstore's messages
        return "no space left on device"
    return (error.strerror if isinstance(error, OSError) else None) or one_line(error)
