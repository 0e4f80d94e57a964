"""What is done to files and values before they are read: each drawn from a generator of its own."""

import json
import os
import random
from pathlib import Path
from typing import Any

VALUES = [None, True, False, 0, -1, 1, 2, 10**9, 10**18, 10**40, 0.5, -0.5, float("nan"), float("inf"), 1e308, "", "a"]
VALUES += ["\0", "../../etc", "x" * 10_000, "\x1b[31m\n", "1e99999999", "1/0", "9" * 5000, [], [1], [[]], {}, {"a": 1}]
VALUES += [[1] * 1000, "\ud800", "gs://x/y", "/dev/zero", "hf-hub:a/b", "=cmd()", ["a"] * 3, "ti", "NaN"]


def damaged_bytes(chance: random.Random, content: bytes) -> bytes:
    """Cut short, with other bytes, with a part twice or taken out, or zeros."""
    data, how = bytearray(content), chance.random()
    start = chance.randrange(max(1, len(data)))
    end = min(len(data), start + chance.choice([1, 2, 8, 64, 4096]))
    if how < 0.15:
        del data[start:]
    elif how < 0.7:
        for _ in range(chance.choice([1, 1, 2, 16])):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif how < 0.8:
        del data[start:end]
    elif how < 0.9:
        data[start:start] = data[start:end]
    else:
        data[start:end] = bytes(end - start) if chance.random() < 0.5 else chance.randbytes(end - start)
    return bytes(data)


def damaged_json(chance: random.Random, values: Any) -> bytes:
    """With another value somewhere, or without one, or damaged as text."""
    values = json.loads(json.dumps(values))
    if chance.random() < 0.1:
        return damaged_bytes(chance, json.dumps(values).encode())
    parent, key = chance.choice(list(_places(values)))
    if chance.random() < 0.2:
        del parent[key]
    else:
        parent[key] = chance.choice(VALUES)
    return json.dumps(values).encode()


def _places(tree: Any):
    """Each container and key of nested dicts and lists."""
    for key in tree if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from _places(tree[key])


def damage_a_file(chance: random.Random, folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    file = chance.choices(files, [path.stat().st_size ** 0.5 for path in files])[0]
    how = chance.random()
    if how < 0.05:
        file.unlink()
    elif how < 0.1:
        file.unlink()
        os.mkfifo(file)
    else:
        file.write_bytes(damaged_bytes(chance, file.read_bytes()))
