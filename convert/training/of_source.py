"""The training state in a source of weights, where it has one."""

from collections.abc import Mapping
from pathlib import Path

from convert.errors import ConversionError
from convert.files import typed_path
from convert.formats import run_folder
from convert.formats.torch_files import load_plain
from convert.training.run_checkpoint import read_run_checkpoint
from convert.training.state import TrainingState
from convert.training.torch_checkpoint import read_torch_checkpoint
from crossvit_jax.files import open_regular


def training_state_of(source: str) -> TrainingState | None:
    """The training state of a run's folder, of one of its checkpoints or in a torch file; None where a source has
    weights alone.

    Raises:
        ConversionError: there is one, which the other framework could not go on with.
    """
    path = typed_path(run_folder.split_kind(source)[0])
    if path.is_dir():
        step = path if path.parent.name == run_folder.CHECKPOINTS else None
        folder = path.parent.parent if step else path.parent if path.name == run_folder.CHECKPOINTS else path
        is_run = run_folder.how_trained(folder) is not None and any((folder / run_folder.CHECKPOINTS).glob("*"))
        return read_run_checkpoint(folder, step) if is_run else None
    return read_torch_checkpoint(path) if _has_optimizer(path) else None


def _has_optimizer(path: Path) -> bool:
    try:
        with open_regular(path) as file:
            is_torch = file.read(2) in (b"PK", b"\x80\x02")
        held = load_plain(path) if is_torch else None
    except (OSError, ConversionError):
        return False
    return isinstance(held, Mapping) and "optimizer" in held
