"""Pictures that are there twice: among the training images and among those held out, where they flatter a model."""

import contextlib
import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from convert.files import shown
from crossvit_jax.files import open_regular

# Of up to so many files the size of each is asked for: 0.1 s in all with the ends of those few that are alike, or some
# seconds where each question goes over a network, on which those of ImageNet's 1.3 million files would take minutes. Of
# more files, only those are asked for that have the class and the name of one on the other side.
_LOOKED_AT = 20_000
_END = 4096  # bytes


def shared_images(train: Sequence[str], held_out: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of a training and a held-out file with the same bytes, each held-out file at most once."""
    looks = (_size, _ends, _all)
    if len(train) + len(held_out) > _LOOKED_AT:
        looks = (_class_and_name, *looks)
    pairs = [(held_out, train)]
    for look in looks:  # each harder than the one before, at what that one could not tell apart
        pairs = [pair for held, trained in pairs for pair in _alike(held, trained, look)]
    return [(trained[0], path) for held, trained in pairs for path in held]


def shared_note(shared: Sequence[tuple[str, str]], count: int) -> list[str]:
    """A line about what `shared_images` found among so many held-out images, if anything."""
    if not shared:
        return []
    trained, held_out = map(shown, shared[0])
    return [f"{len(shared)} of {count} held-out images are training images too, byte for byte: {held_out} is {trained}"]


def _alike(
    held_out: Iterable[str], train: Iterable[str], look: Callable[[str], Any]
) -> list[tuple[list[str], list[str]]]:
    """Held-out and training files that look alike, group by group."""
    groups = defaultdict(lambda: ([], []))
    for side, paths in enumerate((held_out, train)):
        for path in paths:
            with contextlib.suppress(OSError):  # whoever reads it for its pixels tells that
                if seen := look(path):  # empty files are alike, and are no pictures
                    groups[seen][side].append(path)
    return [group for group in groups.values() if all(group)]


def _size(path: str) -> int:
    return os.stat(path).st_size


def _ends(path: str) -> bytes:
    with open_regular(path) as file:
        first = file.read(_END)
        file.seek(-min(_END, os.fstat(file.fileno()).st_size), os.SEEK_END)
        return first + file.read(_END)


def _all(path: str) -> bytes:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").digest()


def _class_and_name(path: str) -> str:
    return os.sep.join(path.rsplit(os.sep, 2)[-2:])
