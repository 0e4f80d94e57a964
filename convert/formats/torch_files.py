"""Checkpoints of torch, read without running what is in them."""

import argparse
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.errors import ConversionError, one_line

# Where training checkpoints keep the weights. As in timm, averaged weights come first: they are the evaluated ones.
_NESTED = ("state_dict_ema", "model_ema", "state_dict", "model")


def read_torch(path: Path) -> tuple[Mapping[str, Any], list[str]]:
    """The state dict in a `.pth` or `.bin` file, and notes on where in the file it was.

    Raises:
        ConversionError: the file is damaged, holds no state dict, or would run code if it were unpickled.
    """
    import torch

    checkpoint = load_plain(path)
    if not isinstance(checkpoint, Mapping):
        raise ConversionError(f"{path} holds a {type(checkpoint).__name__}, not a state dict")
    present = [key for key in _NESTED if isinstance(checkpoint.get(key), Mapping)]
    if present:
        taken, *others = present
        return checkpoint[taken], [f"the weights under {taken} were taken, not {', '.join(others)}"] if others else []
    if not any(isinstance(value, torch.Tensor) for value in checkpoint.values()):
        keys = ", ".join(map(str, list(checkpoint)[:8])) or "nothing"
        raise ConversionError(f"{path} holds no state dict, bare or under {', '.join(_NESTED)}; it holds {keys}")
    return checkpoint, []


def load_plain(path: Path) -> Any:
    """What a torch file holds, if that is tensors and plain values, or of classes that torch was told are safe.

    Raises:
        ConversionError: the file is damaged, or would run code if it were unpickled.
    """
    import torch

    if zipfile.is_zipfile(path):
        _check_sums(path)
    try:
        # IBM's, DeiT's and timm's training checkpoints hold their flags, a plain container of values
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # torch raises whatever the damage leads to: EOFError, RuntimeError, ValueError, …
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused:
            raise ConversionError(
                f"{path} was refused: to unpickle it would run code ({refused[1]}); save the bare state dict instead"
            ) from None
        if isinstance(error, pickle.UnpicklingError):
            raise ConversionError(f"{path} is damaged, or a pickle that torch.save did not write: not read") from None
        raise ConversionError(f"{path} is a truncated or damaged torch checkpoint: {one_line(error)}") from None


def _check_sums(path: Path) -> None:
    """torch itself reads damaged tensors without a word."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError) as error:
        raise ConversionError(f"{path} is a truncated or damaged torch checkpoint: {one_line(error)}") from None
    if damaged:
        raise ConversionError(f"{path} is damaged: the checksum of its part {damaged} is wrong")
