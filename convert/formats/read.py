"""Reads weights in every form in which people hold them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from convert import metadata
from convert.errors import ConversionError, one_line
from convert.files import typed_path
from convert.formats import hub, timm_config
from convert.formats.find import find_weights
from convert.formats.orbax_folder import read_orbax
from convert.formats.torch_files import read_torch
from convert.tensors import DTYPES
from convert.tree import flatten, from_flax_paths, from_state_dict
from crossvit_jax.config import TIMM_NAMES, get_config

_SAFETENSORS_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}

# what a training run leaves in its folder
RUN_WEIGHTS, RUN_AVERAGE, RUN_CHECKPOINTS = "weights.safetensors", "weights-ema.safetensors", "checkpoints"
_LONGEST_HEADER = 100_000_000  # bytes; the safetensors format sets this limit


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What a source holds: tensors under timm's names, our own description if it has one, and notes for the user."""

    tensors: Mapping[str, np.ndarray]
    description: dict | str | None = None
    said: dict | None = None  # by timm's config.json beside it, see `timm_config`
    notes: list[str] = field(default_factory=list)


def read(source: str | Path) -> Stored:
    """Reads `hf-hub:owner/repo`, a safetensors file with timm's or Flax's names, a torch checkpoint, or a folder:
    of Orbax, or of a training run.

    Files are told apart by their content, not by their names.

    Raises:
        ConversionError: there is no such source, it cannot be read, or it is damaged.
    """
    if str(source).startswith(hub.PREFIXES):
        path, notes = hub.download(str(source)[len(hub.PREFIXES[0]) :])
        stored = _read_path(path)
        return replace(stored, notes=[*stored.notes, *notes])
    return _read_path(typed_path(source))


def _read_path(path: Path) -> Stored:
    try:
        if (path / RUN_WEIGHTS).is_file():
            stored = _read_file(path / RUN_WEIGHTS)
            has_average = (path / RUN_AVERAGE).is_file()
            note = f"{RUN_WEIGHTS} was taken, not the moving average of the weights in {RUN_AVERAGE}"
            return replace(stored, notes=[*stored.notes, note]) if has_average else stored
        if (path / RUN_CHECKPOINTS).is_dir():  # of a run that has not come to its end
            path = path / RUN_CHECKPOINTS
        if path.is_dir():
            params, description, notes = read_orbax(path)
            return Stored(tensors=flatten(params), description=description, notes=notes)
        return replace(_read_file(path), said=timm_config.read_beside(path))
    except FileNotFoundError:
        raise ConversionError(f"{path} does not exist{_hint(path)}") from None
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error.strerror or one_line(error)}") from None


def _read_file(path: Path) -> Stored:
    with path.open("rb") as file:
        head = file.read(512)
    return _reader(path, head)(path)


def _reader(path: Path, head: bytes) -> Callable[[Path], Stored]:
    """The function that reads a file which begins with these bytes."""
    if not head:
        raise ConversionError(f"{path} is empty")
    if head.startswith(b"version https://git-lfs"):
        raise ConversionError(f"{path} is a git-lfs pointer, not the weights; `git lfs pull` fetches them")
    if head.lstrip().startswith(b"<"):
        raise ConversionError(f"{path} is a web page, not weights: the download went wrong")
    if int.from_bytes(head[:8], "little") <= _LONGEST_HEADER and head[8:9] == b"{":
        return _read_safetensors
    if head.startswith((b"PK", b"\x80")):  # a zip archive, or a bare pickle as before torch 1.6
        return _read_torch
    raise ConversionError(f"{path} is neither a safetensors file nor a torch checkpoint, or it is damaged")


def _read_torch(path: Path) -> Stored:
    state_dict, notes = read_torch(path)
    return Stored(tensors=from_state_dict(state_dict), notes=notes)


def _read_safetensors(path: Path) -> Stored:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            entries = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
            taken, notes = find_weights(entries, _is_weight, str(path)) or (entries, [])
            dtypes = {name: entry.get_dtype() for name, entry in taken.items()}
            wrong = [f"{name} ({dtype})" for name, dtype in dtypes.items() if dtype not in _SAFETENSORS_DTYPES]
            if wrong:
                raise ConversionError(f"{path}: weights can have {', '.join(DTYPES)}; not so {', '.join(wrong)}")
            tensors = {name: entry[...] for name, entry in taken.items()}
            description = (file.metadata() or {}).get(metadata.KEY)
    except SafetensorError as error:
        raise ConversionError(f"{path} is a truncated or damaged safetensors file: {one_line(error)}") from None
    is_flax = any(name.endswith((".kernel", ".scale")) for name in tensors)
    tensors = from_flax_paths(tensors) if is_flax else from_state_dict(tensors)
    return Stored(tensors=tensors, description=description, notes=notes)


def _is_weight(entry: Any) -> bool:
    return entry.get_dtype() in _SAFETENSORS_DTYPES and len(entry.get_shape()) > 0


def _hint(path: Path) -> str:
    """Where a name that is no file may have been meant."""
    name = path.name.split(".")[0]
    try:
        timm_name = TIMM_NAMES[get_config(name).name]
    except ValueError:
        return ""
    return "" if path.suffix in (".pth", ".safetensors", ".bin") else f"; did you mean hf-hub:timm/{timm_name}.in1k?"
