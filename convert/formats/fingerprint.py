"""Fingerprints of what is written, by which damage is noticed: tensorstore and safetensors read a flipped bit as it is.

Of an Orbax folder a fingerprint is JSON: `marks`, a number for each array by its path in the item, and `sum`, a digest
of the marks and of the JSON that lies beside them. Ours are in `progress` of a run's checkpoint, and in an item of
their own in the folders that `python -m convert` writes. A safetensors file of ours has `metadata.digest` in its
header. What is from elsewhere has none.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert import metadata
from convert.errors import ConversionError
from crossvit_jax.files import read_json

VERSION = 2
ITEM = "fingerprint"  # of a folder that convert writes
RUN_ITEM = "progress"  # of a run's checkpoint, where there is more beside it
_MARKS, _SUM = "marks", "sum"
_OF_BEFORE = "fingerprint"  # numbers without paths, in jax's order of the leaves
_COVERED = {RUN_ITEM: "state", ITEM: "params"}  # whose arrays they are of
_STEP, _ONE = np.uint32(2654435761), np.uint32(1)


# --- marks ---


def marks_on_devices(tree: Any, *, version: int = VERSION) -> jax.Array:
    """For each leaf of a tree, in jax's order, a number that changes when any of its elements does (uint32).

    That is the sum of its bits, weighted by place. Integers add up to the same in any order, so neither mesh nor number
    of devices matters. The weights are odd: an even one would lose the highest bit, which is the sign; in the first
    version every other one was even. To be jitted.
    """

    def mark(leaf: jax.Array) -> jax.Array:
        leaf = leaf.astype(jnp.uint8) if leaf.dtype == bool else leaf
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}.get(leaf.dtype.itemsize, jnp.uint32)
        bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32).reshape(-1)
        return jnp.sum(bits * _weights(jnp.arange(bits.size, dtype=jnp.uint32), version), dtype=jnp.uint32)

    return jnp.stack([mark(leaf) for leaf in jax.tree.leaves(tree)])


def paths(tree: Any) -> list[str]:
    """The path of each leaf of a tree, in jax's order: keys with slashes between them, the same for any container."""
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(tree)]


def marks_of(tree: Any, *, version: int = VERSION) -> dict[str, int]:
    """The marks of a tree of numpy arrays, by path."""
    return dict(zip(paths(tree), (_mark(leaf, version) for leaf in jax.tree.leaves(tree)), strict=True))


def _mark(leaf: Any, version: int) -> int:
    array = np.asarray(leaf)
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}.get(array.dtype.itemsize, np.uint32)
    bits = np.ascontiguousarray(array).reshape(-1).view(unsigned)
    return int(np.sum(bits * _weights(np.arange(bits.size, dtype=np.uint32), version), dtype=np.uint32))


def _weights(places: Any, version: int) -> Any:
    return places * _STEP + _ONE if version == 1 else places * _STEP | _ONE


# --- what is stored ---


def sealed(marks: Mapping[str, int], beside: Mapping[str, Any], description: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values with a fingerprint: of the arrays with these marks, of the values themselves and of a description."""
    values = {**beside, _MARKS: dict(marks)}
    return {**values, _SUM: _digest(values, description)}


def open_seal(values: Any, description: Any) -> dict[str, Any]:
    """What `sealed` was given beside the marks. Raises ConversionError if that or the description was changed."""
    if not isinstance(values, dict):
        raise ConversionError("it is damaged: its fingerprint is none")
    told = dict(values)
    if told.keys().isdisjoint((_MARKS, _SUM)):  # of an earlier version
        told.pop(_OF_BEFORE, None)
        return told
    if told.pop(_SUM, None) != _digest(told, description):
        raise ConversionError("it is damaged: what it tells beside its arrays is not what was written")
    told.pop(_MARKS, None)
    return told


def version_of(values: Mapping[str, Any]) -> int:
    """Of the marks among stored JSON values."""
    return 1 if _OF_BEFORE in values else VERSION


def is_of(values: Mapping[str, Any], marks: Mapping[str, int]) -> bool:
    """Whether stored JSON values have the fingerprint of a whole state with these marks, which are in jax's order."""
    return values.get(_MARKS, values.get(_OF_BEFORE)) in (dict(marks), list(marks.values()))


def check(folder: Path, item: str, tree: Any, every: Iterable[str]) -> None:
    """Compares what was read of an item of an Orbax folder with the fingerprint there, if there is one.

    Args:
        tree: nested dicts and lists of numpy arrays; the whole item, or parts of it under the keys that lead to them.
        every: the paths of all arrays in the item.

    Raises ConversionError if anything differs.
    """
    values = read_seal(folder)
    kept = None if values is None else _kept(values, folder, item, every)
    if kept is None:
        return
    differing = [path for path, mark in marks_of(tree, version=version_of(values)).items() if kept.get(path) != mark]
    differing += sorted(kept.keys() ^ set(every))
    if differing:
        few = ", ".join(differing[:3])
        raise ConversionError(f"{folder} is damaged: {len(differing)} arrays are not what was written ({few})")


def read_seal(folder: Path) -> dict[str, Any] | None:
    """The JSON values with the fingerprint of an Orbax folder, which are checked; None where there are none."""
    file = next(
        (folder / name / "metadata" for name in (RUN_ITEM, ITEM) if (folder / name / "metadata").exists()), None
    )
    if file is None:
        return None
    described = folder / metadata.KEY / "metadata"
    try:
        values = read_json(file)
        open_seal(values, read_json(described) if described.exists() else None)
    except ConversionError as error:
        raise ConversionError(f"{folder}: {error}") from None
    except ValueError:
        raise ConversionError(f"{folder} is damaged: beside its arrays is no JSON") from None
    return values


def _kept(values: Mapping[str, Any], folder: Path, item: str, every: Iterable[str]) -> Mapping[str, int] | None:
    """The marks of an item by path; None where it has none."""
    if item != _COVERED[RUN_ITEM if (folder / RUN_ITEM).is_dir() else ITEM]:
        return None
    before = values.get(_OF_BEFORE)
    if isinstance(before, list):
        ordered = sorted(every, key=_place)
        if len(ordered) != len(before):
            raise ConversionError(f"{folder} is damaged: it has {len(ordered)} arrays, and {len(before)} were written")
        return dict(zip(ordered, before, strict=True))
    return values.get(_MARKS)


def _place(path: str) -> list[tuple[bool, int, str]]:
    """By which paths are in jax's order."""
    keys = path.split("/")
    return [(not key.isdecimal(), int(key) if key.isdecimal() else 0, key) for key in keys]


def _digest(values: Mapping[str, Any], description: Any) -> str:
    # once through JSON, where keys are texts and tuples are lists
    plain = json.loads(json.dumps([values, description]))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
