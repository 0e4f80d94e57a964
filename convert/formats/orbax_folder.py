"""Orbax checkpoints: ours, and any other whose tree holds the parameters of a CrossViT somewhere."""

import functools
import operator
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert import metadata
from convert.errors import ConversionError, one_line, quiet_storage
from convert.formats import fingerprint
from convert.formats.find import Place, choose, others_than
from crossvit_jax.files import check_regular, read_json

_ITEM = "params"
_DONE = "_CHECKPOINT_METADATA"
# what Orbax leaves of what is written here, the first always
ORBAX_FILES = (_DONE, "commit_success.txt", "_METADATA", "_sharding", _ITEM, metadata.KEY, fingerprint.ITEM)


def is_orbax(folder: Path) -> bool:
    """Whether a folder is a complete Orbax checkpoint, or one step of a checkpoint manager."""
    return (folder / _DONE).is_file()


def write_orbax(folder: Path, params: Mapping, description: dict) -> None:
    """Writes nested Flax parameters as item `params`, and the description and a fingerprint as JSON items beside it.

    Raises:
        Exception: whatever Orbax raises; it leaves a temporary folder beside `folder` then.
    """
    import orbax.checkpoint as ocp

    arrays = jax.tree.map(np.ascontiguousarray, params)
    items = {
        _ITEM: ocp.args.StandardSave(arrays),
        metadata.KEY: ocp.args.JsonSave(description),
        fingerprint.ITEM: ocp.args.JsonSave(fingerprint.sealed(fingerprint.marks_of(arrays), {}, description)),
    }
    with quiet_storage(), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(folder.absolute(), ocp.args.Composite(**items))


def read_orbax(folder: Path) -> tuple[dict[str, Any], dict | None, list[str]]:
    """The nested Flax parameters in a checkpoint, its description if it is ours, and notes on where they were.

    Takes a single tree, one of several items, or a folder of numbered steps, of which the latest. In the tree the
    parameters may be at the top or below keys such as `params`.

    Raises:
        ConversionError: it is no Orbax checkpoint, it is damaged, or there is no CrossViT in it.
        OSError: something in it is no regular file, or cannot be read.
    """
    notes = []
    if not is_orbax(folder):
        steps = [step for step in folder.iterdir() if step.name.isdigit() and is_orbax(step)]
        if not steps:
            raise ConversionError(f"{folder} is a folder but no Orbax checkpoint; to read a file in it, name the file")
        folder = max(steps, key=lambda step: int(step.name))
        notes = [f"step {folder.name}, the latest of {len(steps)}, was taken"] if steps[1:] else []
    check_regular(folder)
    try:
        params, found = _read_params(folder)
        file = folder / metadata.KEY / "metadata"  # Orbax's JSON items are one file of this name
        description = read_json(file) if file.exists() else None
    except ConversionError:
        raise
    except Exception as error:  # Orbax and tensorstore raise whatever the damage leads to
        raise ConversionError(f"{folder} is a damaged Orbax checkpoint: {one_line(error)}") from None
    return params, description, notes + found


def _read_params(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The parameters, and notes on where they were."""
    import orbax.checkpoint as ocp

    items = [folder] if (folder / "_METADATA").is_file() else sorted(p.parent for p in folder.glob("*/_METADATA"))
    with quiet_storage(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        trees = {item: checkpointer.metadata(item.absolute()).item_metadata.tree for item in items}
        places = {
            Place((*(() if item == folder else (item.name,)), *map(str, keys))): (item, keys)
            for item, tree in trees.items()
            for keys in _find(tree)
        }
        places = {place: where for place, where in places.items() if not place.is_of_an_optimiser}
        if not places:
            raise ConversionError(f"{folder} is an Orbax checkpoint without a CrossViT: no cls_token_0 in it")
        place = choose(list(places), str(folder))
        item, keys = places[place]
        wanted = functools.reduce(operator.getitem, keys, trees[item])
        for key in reversed(keys):
            wanted = {key: wanted}
        # as numpy: nothing is cast, and nothing is put on a device that this machine may not have
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        args = ocp.args.PyTreeRestore(item=wanted, restore_args=how, partial_restore=True)
        held = checkpointer.restore(item.absolute(), args=args)
    fingerprint.check(folder, item.name, held, fingerprint.paths(trees[item]))
    restored = functools.reduce(operator.getitem, keys, held)
    return _without_value(restored), _notes(place, list(places))


def _notes(place: Place, places: Sequence[Place]) -> list[str]:
    note = others_than(place, places)
    if note is None and place.keys and place.keys[-1] != _ITEM:
        note = f"the weights under {place} were taken"
    return [] if note is None else [note]


def _find(tree: Any, keys: tuple = ()) -> Iterator[tuple]:
    """The keys that lead to parameters of a CrossViT, or to what has their form: an average, or moments."""
    if not isinstance(tree, Mapping):
        return
    backbone = tree.get("backbone")  # of a detector or segmenter, whose body alone is not meant
    if "cls_token_0" in tree or (isinstance(backbone, Mapping) and "pyramid" in backbone):
        yield keys
        return
    for key in sorted(tree, key=str):
        yield from _find(tree[key], (*keys, key))


def _without_value(tree: Any) -> Any:
    """The tree without the level `value`, which a saved `nnx.State` has below every parameter."""
    if not isinstance(tree, Mapping):
        return tree
    if set(tree) == {"value"}:
        return tree["value"]
    return {key: _without_value(below) for key, below in tree.items()}
