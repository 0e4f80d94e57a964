"""Checkpoints of torch, read without running what is in them."""

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.errors import ConversionError, listed, one_line, require
from convert.formats import timm_config
from convert.formats.find import PREFERRED, find_weights
from convert.tensors import MOST_TENSORS


def read_torch(path: Path) -> tuple[Mapping[str, Any], list[str]]:
    """The state dict in a `.pth` or `.bin` file, and notes on where in the file it was and what was left out.

    Raises:
        ConversionError: the file is damaged, holds no state dict or several models, or might run code if it were
            unpickled.
    """
    checkpoint = load_plain(path)
    if not isinstance(checkpoint, Mapping):
        raise ConversionError(f"{path} holds a {type(checkpoint).__name__}, not a state dict")

    import torch

    def is_weight(value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 0

    found = find_weights(checkpoint, is_weight, str(path), expected=PREFERRED)
    if found is not None:
        for name, value in found[0].items():
            if isinstance(value, torch.Tensor) and type(value) not in (torch.Tensor, torch.nn.Parameter):
                kind = type(value).__name__
                raise ConversionError(f"{path} holds {name} as a {kind}: convert the model that it was quantised from")
        return found
    for state_dict in (*(checkpoint.get(key) for key in PREFERRED), checkpoint):
        tensors = {k: v for k, v in state_dict.items() if is_weight(v)} if isinstance(state_dict, Mapping) else None
        if tensors:
            return tensors, []  # of something else, which is told where it is looked at
    raise ConversionError(f"{path} holds no CrossViT; it holds {listed(map(str, checkpoint)) or 'nothing'}")


_ENCRYPTED = 0x1  # among the flags of a part of a zip


class PlainValue:
    """Stands for a number, an array or a dtype of numpy, a path, a date or the like: classes that hold values and run
    nothing.

    Nobody asks for these here, so theirs is no code that a file could mislead.
    """

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def plain_dict(*_: Any) -> dict:
    """Stands for `collections.defaultdict`, without what that calls for a new key."""
    return {}


def plain_list(*_: Any) -> list:
    """Stands for `collections.deque`."""
    return []


_NUMPY = ("numpy.dtype", "numpy.ndarray", "numpy.float64", "numpy.float32", "numpy.int64", "numpy.bool_", "numpy.str_")
_NUMPY += tuple(
    f"{core}.multiarray.{name}" for core in ("numpy.core", "numpy._core") for name in ("scalar", "_reconstruct")
)
_PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
_PLAIN = (
    *_NUMPY,
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in _PATHS),
    *(f"datetime.{name}" for name in ("datetime", "date", "time", "timedelta", "timezone")),
    *(f"builtins.{name}" for name in ("int", "float", "str", "list", "dict", "set")),  # what a defaultdict calls
    *(f"builtins.{name}" for name in ("complex", "frozenset", "slice", "range", "bytearray")),
    "types.SimpleNamespace",
    "decimal.Decimal",
    "fractions.Fraction",
    "uuid.UUID",
    "uuid.SafeUUID",
)


def load_plain(path: Path) -> Any:
    """What a torch file holds, if that is tensors and plain values, or of classes that torch was told are safe.

    Raises:
        ConversionError: the file is damaged, or might run code if it were unpickled; or it is of a training of timm's
            with images that were prepared otherwise than here.
        MissingExtra: torch is not installed.
    """
    require(str(path), "torch")
    import torch

    if zipfile.is_zipfile(path):
        _check_sums(path)
    try:
        # IBM's, DeiT's and timm's training checkpoints hold their flags, a plain container of values
        plain = [*((PlainValue, name) for name in _PLAIN)]
        plain += [(plain_dict, "collections.defaultdict"), (plain_list, "collections.deque")]
        known = torch.serialization.safe_globals([argparse.Namespace, PlainValue, *plain])
        with known, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of what it reads: ours tell whether it can be used
            held = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # torch raises whatever the damage leads to: EOFError, RuntimeError, ValueError, …
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused:
            raise ConversionError(
                f"{path} was refused: it holds a {refused[1]}, and to unpickle that might run code; "
                "save the bare state dict instead"
            ) from None
        if isinstance(error, pickle.UnpicklingError):
            raise ConversionError(f"{path} is damaged, or a pickle that torch.save did not write: not read") from None
        raise ConversionError(f"{path} is a truncated or damaged torch checkpoint: {one_line(error)}") from None
    try:
        timm_config.check_flags(held.get("args") if isinstance(held, Mapping) else None)
    except ConversionError as error:
        raise ConversionError(f"{path}: {error}") from None
    return held


def _check_sums(path: Path) -> None:
    """torch itself reads damaged tensors without a word."""
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            if any(part.compress_type != zipfile.ZIP_STORED or part.flag_bits & _ENCRYPTED for part in parts):
                raise ConversionError(f"{path} is a compressed or encrypted zip: torch.save writes none")
            if not any(part.filename.endswith("/data.pkl") for part in parts):
                raise ConversionError(f"{path} is a zip that torch.save did not write: it has no data.pkl")
            if len(parts) > MOST_TENSORS:
                raise ConversionError(f"{path} has {len(parts):,} parts; read are {MOST_TENSORS:,} tensors at most")
            damaged = archive.testzip()
    except (ConversionError, MemoryError):
        raise
    except Exception as error:  # zipfile raises whatever the damage leads to: BadZipFile, RuntimeError, ValueError, …
        raise ConversionError(f"{path} is a truncated or damaged torch checkpoint: {one_line(error)}") from None
    if damaged:
        raise ConversionError(f"{path} is damaged: the checksum of its part {damaged} is wrong")
