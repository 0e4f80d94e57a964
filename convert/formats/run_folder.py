"""The folder of a training run as a source of weights: which of all that it keeps are meant."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from convert.errors import ConversionError, one_line, quiet_storage
from convert.files import LOCAL_PREFIX
from crossvit_jax.files import check_regular, read_json, read_regular

# what a run leaves in its folder: at its end the last weights, those of the best evaluation, and the average
WEIGHTS, BEST, AVERAGE = "weights.safetensors", "weights-best.safetensors", "weights-ema.safetensors"
CHECKPOINTS, CURVES = "checkpoints", "curves.png"
_KINDS = ("last", "ema")  # what may follow the folder behind a colon
_CONFIG, _STATE, _LOG = "config.json", "state", "metrics.jsonl"
# by task, what chooses the best evaluation: its name in the log, as people know it, digits and unit
_CHOOSING = {
    "classification": ("top1", "top-1", ".2f", " %"),
    "detection": ("ap", "AP", ".3f", ""),
    "segmentation": ("miou", "mIoU", ".3f", ""),
}
_KEPT = {"params": "the model", "ema": "the average of the weights"}


class Choice(NamedTuple):
    """What is taken of a run."""

    path: Path  # a file, or the folder of a checkpoint
    key: str | None  # `params` or `ema`, of a checkpoint
    note: str


def split_kind(source: str) -> tuple[str, str | None]:
    """`runs/X:ema` or `runs/X:last` as the folder and what is wanted of it; any other path as it is.

    timm's `local-dir:` before it is dropped.
    """
    source = source.removeprefix(LOCAL_PREFIX)
    folder, _, kind = source.rpartition(":")
    return (folder, kind) if folder and kind in _KINDS else (source, None)


def choose(folder: Path, kind: str | None) -> Choice | None:
    """What is meant by the folder of a run; None where it is no such folder.

    Without a kind that is the weights of the best evaluation, raw or averaged, and of a run that has not come to its
    end the newest checkpoint.

    Raises:
        ConversionError: it keeps no average, or it is no run and a kind is asked for.
    """
    checkpoints = _checkpoints(folder)
    if not (folder / WEIGHTS).is_file() and not (folder / CHECKPOINTS).is_dir():
        if kind is None:
            return None
        raise ConversionError(f"{folder} is not the folder of a run, which alone has :{kind}")
    file = {None: BEST, "last": WEIGHTS, "ema": AVERAGE}[kind]
    if (folder / file).is_file():
        return Choice(folder / file, None, _file_note(folder, file))
    is_done = (folder / WEIGHTS).is_file()
    if kind is None and is_done:  # of an earlier version
        return _best_checkpoint(folder, checkpoints) or Choice(folder / WEIGHTS, None, _file_note(folder, WEIGHTS))
    if not checkpoints:
        what = "average of the weights" if kind == "ema" else "weights yet"
        raise ConversionError(f"the run in {folder} keeps no {what}")
    key = "ema" if kind == "ema" else "params"
    state = "" if is_done else "the run has not come to its end: "
    newest = checkpoints[-1]
    return Choice(newest, key, f"{state}taken is {_KEPT[key]} of the newest checkpoint, step {newest.name}")


def read_state(checkpoint: Path, keys: Sequence[str] | None = None) -> dict[str, Any]:
    """The training state in a run's checkpoint as numpy arrays in nested dicts; optax's state has lists too.

    Args:
        keys: of the parts to read, such as `params`; None: all.

    Raises:
        ConversionError: a part is not there, or the checkpoint is damaged.
    """
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    from convert.formats import fingerprint  # late: commands ask what a folder is before they need jax

    folder = (checkpoint / _STATE).absolute()
    try:
        check_regular(checkpoint)
        with quiet_storage(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            tree = checkpointer.metadata(folder).item_metadata.tree
            missing = [key for key in keys or () if key not in tree]
            if missing:
                raise ConversionError(f"the checkpoint {checkpoint} lacks {_KEPT.get(missing[0], missing[0])}")
            wanted = {key: tree[key] for key in keys or tree}
            # as numpy: nothing is cast, and nothing is put on a device that this machine may not have
            how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
            args = ocp.args.PyTreeRestore(item=wanted, restore_args=how, partial_restore=True)
            state = checkpointer.restore(folder, args=args)
        fingerprint.check(checkpoint, _STATE, state, fingerprint.paths(tree))
        return state
    except ConversionError:
        raise
    except Exception as error:  # Orbax and tensorstore raise whatever the damage leads to
        raise ConversionError(f"{checkpoint} is a damaged checkpoint: {one_line(error)}") from None


def read_description(checkpoint: Path) -> dict[str, Any]:
    """The description of the model beside the state. Raises ConversionError."""
    from convert import metadata  # late, as above

    return _read_item(checkpoint, lambda: read_json(checkpoint / metadata.KEY / "metadata"))


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """What a run remembers beside the state, if that is what was written. Raises ConversionError."""
    from convert.formats import fingerprint

    progress = _read_item(checkpoint, lambda: fingerprint.read_seal(checkpoint))
    if progress is None:
        raise ConversionError(f"{checkpoint} is a damaged checkpoint: it has no {fingerprint.RUN_ITEM}")
    return progress


def _read_item(checkpoint: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except ConversionError:
        raise
    except (OSError, ValueError) as error:
        raise ConversionError(f"{checkpoint} is a damaged checkpoint: {one_line(error)}") from None


def how_trained(folder: Path) -> dict[str, Any] | None:
    """What is told of a run to those who get its weights: settings and data; None where its folder tells nothing."""
    try:
        about = read_json(folder / _CONFIG)
        train, data = about["train"], about.get("data", {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if not isinstance(train, dict) or not isinstance(data, dict):
        return None
    names = (
        "dataset",
        "recipe",
        "init",
        "epochs",
        "batch_size",
        "optimizer",
        "lr",
        "weight_decay",
        "ema_decay",
        "seed",
    )
    told = {name.replace("_", " "): train[name] for name in names if train.get(name) is not None}
    counts = ("train_images", "held_out_images", "held_out_split")
    told |= {name.replace("_", " "): data[name] for name in counts if data.get(name) is not None}
    return told | _last_evaluation(folder)


def _last_evaluation(folder: Path) -> dict[str, Any]:
    """The figures of the last evaluation in a run's log, by their names there; nothing where it tells none."""
    try:
        lines = [json.loads(line) for line in read_regular(folder / _LOG).splitlines()]
        last = [line for line in lines if line.get("eval/loss") is not None][-1]
        figures = {name: round(value, 4) for name, value in last.items() if name.startswith("eval/")}
        return {"last evaluation": f"epoch {last['epoch']}"} | figures
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return {}


def told_of(folder: Path) -> dict[str, Any]:
    """What the weights of a run bring along for people: `trained`, see `how_trained`, and the picture `curves`."""
    curves = folder / CURVES
    return {"trained": how_trained(folder), "curves": curves if curves.is_file() else None}


def newest_checkpoint(folder: Path) -> Path:
    """The checkpoint of a run's last saved step. Raises ConversionError where there is none."""
    checkpoints = _checkpoints(folder)
    if not checkpoints:
        raise ConversionError(f"the run in {folder} has no checkpoint")
    return checkpoints[-1]


def _file_note(folder: Path, file: str) -> str:
    others = [name for name in (BEST, WEIGHTS, AVERAGE) if name != file and (folder / name).is_file()]
    return f"{file} was taken" + (f", not {' or '.join(others)}" if others else "")


def _checkpoints(folder: Path) -> list[Path]:
    found = [path for path in (folder / CHECKPOINTS).glob("*") if path.name.isdecimal()]
    return sorted(found, key=lambda path: int(path.name))


def _task(folder: Path) -> str:
    """What a run learned; classification where its settings do not tell. Raises as `read_json` does."""
    try:
        return read_json(folder / _CONFIG)["train"].get("task", "classification")
    except FileNotFoundError:
        return "classification"


def _best_checkpoint(folder: Path, checkpoints: Sequence[Path]) -> Choice | None:
    """The best evaluation of those whose checkpoints are kept, by the run's log; None where that tells none."""
    there = {int(path.name): path for path in checkpoints}
    try:
        lines = [json.loads(line) for line in read_regular(folder / _LOG).splitlines()]
        metric, label, digits, unit = _CHOOSING[_task(folder)]
        names = {"ema": f"eval/ema_{metric}", "params": f"eval/{metric}"}  # the better, of equal ones the average
        scored = [
            (line[name], -place, line, key)
            for place, (key, name) in enumerate(names.items())
            for line in lines
            if line.get(name) is not None and line["step"] in there
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if not scored:
        return None
    score, _, line, key = max(scored, key=lambda entry: entry[:2])
    told = f"taken is {_KEPT[key]} of the best checkpoint, epoch {line['epoch']}, {label} {score:{digits}}{unit}"
    return Choice(there[line["step"]], key, told)
