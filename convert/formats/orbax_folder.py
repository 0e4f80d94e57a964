"""Orbax checkpoints: ours, and any other whose tree holds the parameters of a CrossViT somewhere."""

import functools
import json
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert import metadata
from convert.errors import ConversionError, one_line, quiet

_ITEM = "params"


def is_orbax(folder: Path) -> bool:
    """Whether a folder is a complete Orbax checkpoint, or one step of a checkpoint manager."""
    return (folder / "_CHECKPOINT_METADATA").is_file()


def write_orbax(folder: Path, params: Mapping, description: dict) -> None:
    """Writes nested Flax parameters as item `params`, and the description as a JSON item beside it.

    Raises:
        Exception: whatever Orbax raises; it leaves a temporary folder beside `folder` then.
    """
    import orbax.checkpoint as ocp

    arrays = jax.tree.map(np.ascontiguousarray, params)
    items = {_ITEM: ocp.args.StandardSave(arrays), metadata.KEY: ocp.args.JsonSave(description)}
    with quiet("absl"), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(folder.absolute(), ocp.args.Composite(**items))


def read_orbax(folder: Path) -> tuple[dict[str, Any], dict | None, list[str]]:
    """The nested Flax parameters in a checkpoint, its description if it is ours, and notes on where they were.

    Takes a single tree, one of several items, or a folder of numbered steps, of which the latest. In the tree the
    parameters may be at the top or below keys such as `params`.

    Raises:
        ConversionError: it is no Orbax checkpoint, it is damaged, or there is no CrossViT in it.
    """
    notes = []
    if not is_orbax(folder):
        steps = [step for step in folder.iterdir() if step.name.isdigit() and is_orbax(step)]
        if not steps:
            raise ConversionError(f"{folder} is a folder but no Orbax checkpoint; to read a file in it, name the file")
        folder = max(steps, key=lambda step: int(step.name))
        notes = [f"step {folder.name}, the latest of {len(steps)}, was taken"] if steps[1:] else []
    try:
        params, keys = _read_params(folder)
        file = folder / metadata.KEY / "metadata"  # Orbax's JSON items are one file of this name
        description = json.loads(file.read_text()) if file.is_file() else None
    except ConversionError:
        raise
    except Exception as error:  # Orbax and tensorstore raise whatever the damage leads to
        raise ConversionError(f"{folder} is a damaged Orbax checkpoint: {one_line(error)}") from None
    if keys and keys[-1] != _ITEM:
        notes.append(f"the weights under {'/'.join(keys)} were taken")
    return params, description, notes


def _read_params(folder: Path) -> tuple[dict[str, Any], list[str]]:
    import orbax.checkpoint as ocp

    items = [folder] if (folder / "_METADATA").is_file() else sorted(p.parent for p in folder.glob("*/_METADATA"))
    with quiet("absl"), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        for item in items:
            tree = checkpointer.metadata(item.absolute()).item_metadata.tree
            keys = _find(tree)
            if keys is None:
                continue
            wanted = functools.reduce(operator.getitem, keys, tree)
            for key in reversed(keys):
                wanted = {key: wanted}
            # as numpy: nothing is cast, and nothing is put on a device that this machine may not have
            how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
            args = ocp.args.PyTreeRestore(item=wanted, restore_args=how, partial_restore=True)
            restored = functools.reduce(operator.getitem, keys, checkpointer.restore(item.absolute(), args=args))
            return _without_value(restored), keys if item == folder else [item.name, *keys]
    raise ConversionError(f"{folder} is an Orbax checkpoint without a CrossViT: no cls_token_0 in it")


def _find(tree: Any) -> list[str] | None:
    """The keys that lead to the parameters. `params` goes first: an optimiser's moments have the same names."""
    if not isinstance(tree, Mapping):
        return None
    if "cls_token_0" in tree:
        return []
    for key in sorted(tree, key=lambda key: (key != _ITEM, key)):
        below = _find(tree[key])
        if below is not None:
            return [key, *below]
    return None


def _without_value(tree: Any) -> Any:
    """The tree without the level `value`, which a saved `nnx.State` has below every parameter."""
    if not isinstance(tree, Mapping):
        return tree
    if set(tree) == {"value"}:
        return tree["value"]
    return {key: _without_value(below) for key, below in tree.items()}
