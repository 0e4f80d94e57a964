"""Reads weights in every form in which people hold them."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from convert import metadata
from convert.errors import ConversionError, listed, one_line
from convert.files import typed_path
from convert.formats import hf_folder, hub, run_folder, timm_config
from convert.formats.find import find_weights
from convert.formats.orbax_folder import read_orbax
from convert.formats.torch_files import read_torch
from convert.tensors import DTYPES, MOST_AXES, MOST_TENSORS
from convert.tree import flatten, from_flax_paths, from_state_dict
from crossvit_jax.config import TIMM_NAMES, get_config
from crossvit_jax.files import open_regular

_SAFETENSORS_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}

_BODY = "body"  # where a run that pre-trains has its CrossViT
_LONGEST_HEADER = 100_000_000  # bytes; the safetensors format sets this limit
_LONGEST_READ = 2**24  # bytes of a header that are read: 300 for each of the most tensors


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What a source holds: tensors under timm's names, our own description if it has one, and notes for the user."""

    tensors: Mapping[str, np.ndarray]
    description: dict | str | None = None
    said: dict | None = None  # by timm's config.json beside it, see `timm_config`
    notes: list[str] = field(default_factory=list)
    origin: str | None = None  # where the weights come from, in words, where the file tells
    trained: dict | None = None  # how, see `Weights`
    curves: Path | None = None  # likewise


def read(source: str | Path) -> Stored:
    """Reads `hf-hub:owner/repo`, a safetensors file with timm's or Flax's names, a torch checkpoint, or a folder:
    of Orbax, of a training run, or as repositories of the hub are (also as `local-dir:FOLDER`).

    Files are told apart by their content, not by their names.

    Raises:
        ConversionError: there is no such source, it cannot be read, or it is damaged.
    """
    if str(source).startswith(hub.PREFIXES):
        path, notes = hub.download(str(source)[len(hub.PREFIXES[0]) :])
        stored = _read_path(path)
        return replace(stored, notes=[*stored.notes, *notes])
    folder, kind = run_folder.split_kind(str(source))
    return _read_path(typed_path(folder), kind)


def _read_path(path: Path, kind: str | None = None) -> Stored:
    try:
        choice = run_folder.choose(path, kind)
        if choice is not None:
            return replace(_read_of_run(choice), **run_folder.told_of(path))
        path = hf_folder.weights_in(path) or path
        if path.is_dir():
            params, description, notes = read_orbax(path)
            return Stored(tensors=flatten(params), description=description, notes=notes)
        return replace(_read_file(path), said=timm_config.read_beside(path))
    except FileNotFoundError:
        raise ConversionError(f"{path} does not exist{_hint(path)}") from None
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error.strerror or one_line(error)}") from None


def _read_of_run(choice: run_folder.Choice) -> Stored:
    if choice.key is None:
        stored = _read_file(choice.path)
        note = f"{choice.note}: {stored.origin}" if stored.origin else choice.note
        return replace(stored, notes=[*stored.notes, note])
    params, notes = run_folder.read_state(choice.path, [choice.key])[choice.key], [choice.note]
    if "cls_token_0" in params.get(_BODY, ()):  # of pre-training
        if "head" in params:  # DINO's, which leaves its teacher
            params = run_folder.read_state(choice.path, ["extra"])["extra"]["teacher"]
            notes.append("of student and teacher, the latter was taken")
        notes.append(f"left out of it: {', '.join(sorted(params.keys() - {_BODY}))}")
        params = params[_BODY]
    return Stored(tensors=flatten(params), description=run_folder.read_description(choice.path), notes=notes)


def _read_file(path: Path) -> Stored:
    if path.name == hf_folder.INDEX:
        return _read_safetensors(path, hf_folder.shards(path))
    with open_regular(path) as file:
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


def _read_safetensors(path: Path, files: Sequence[Path] = ()) -> Stored:
    """What a file holds, or all `files` together, which `path` is the index of."""
    from safetensors import SafetensorError, safe_open

    _check_names(path, files or (path,))
    try:
        with ExitStack() as stack:
            opened = [stack.enter_context(safe_open(file, "numpy")) for file in files or (path,)]
            entries = {name: file.get_slice(name) for file in opened for name in file.keys()}  # noqa: SIM118
            taken, notes = find_weights(entries, _is_weight, str(path)) or (entries, [])
            dtypes = {name: entry.get_dtype() for name, entry in taken.items()}
            wrong = [f"{name} ({dtype})" for name, dtype in dtypes.items() if dtype not in _SAFETENSORS_DTYPES]
            wrong += [
                f"{name} ({len(a)} axes)" for name, entry in taken.items() if len(a := entry.get_shape()) > MOST_AXES
            ]
            if wrong:
                raise ConversionError(f"{path}: weights can have {', '.join(DTYPES)}; not so {listed(wrong)}")
            tensors = {name: entry[...] for name, entry in taken.items()}
            said = opened[0].metadata() or {}
    except SafetensorError as error:
        raise ConversionError(f"{path} is a truncated or damaged safetensors file: {one_line(error)}") from None
    written = said.pop(metadata.DIGEST, None)
    if written is not None and not files and written != metadata.digest(tensors, said):
        raise ConversionError(
            f"{path} is damaged: it is not what was written. If another program changed its weights on purpose, that "
            f"has to leave {metadata.DIGEST!r} out of the header"
        )
    is_flax = any(name.endswith((".kernel", ".scale")) for name in tensors)
    tensors = from_flax_paths(tensors) if is_flax else from_state_dict(tensors)
    known = {"description": said.get(metadata.KEY), "origin": said.get(metadata.ORIGIN)}
    return Stored(tensors=tensors, notes=notes, **known)


def _check_names(path: Path, files: Sequence[Path]) -> None:
    """Raises ConversionError if there are too many tensors, which would take minutes to look at, or one of them is
    there twice under one name in a file: the library takes the last without a word."""

    def unequal(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
            raise ConversionError(f"{file} has names twice: {listed(twice)}")
        return dict(pairs)

    tensors = 0
    for file in files:
        with open_regular(file) as opened:
            header = opened.read(min(int.from_bytes(opened.read(8), "little"), _LONGEST_READ + 1))
        if len(header) > _LONGEST_READ:
            raise ConversionError(f"{file} has a header of more than {_LONGEST_READ:,} bytes, which no model needs")
        tensors += header.count(b'"data_offsets"')
        if tensors > MOST_TENSORS:
            raise ConversionError(f"{path} has {tensors:,} tensors; read are {MOST_TENSORS:,} at most")
        try:
            json.loads(header, object_pairs_hook=unequal)
        except ConversionError:
            raise
        except (ValueError, RecursionError):  # of damage the library tells
            return


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
