"""What the devices tell each other in a compiled program, read off its text (XLA's optimised HLO)."""

import math
import re
from collections import defaultdict
from dataclasses import dataclass

from train.cost.hlo import instructions, runs

_KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "ragged-all-to-all",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_COLLECTIVE = re.compile(rf" ({'|'.join(_KINDS)})(-start|-done)?\([^%]*(?:%([\w.\-]+))?")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")


@dataclass(frozen=True)
class Traffic:
    """The collective operations of one kind that a device takes part in during one run of a program."""

    calls: int
    volume: int  # bytes of the whole arrays, see `communication`
    sent: float  # bytes that leave the device where the operations are done on a ring


def communication(hlo: str) -> dict[str, Traffic]:
    """The traffic of one device during one run of a program, by kind of collective, the largest volume first.

    The volume of an operation is the size of its array as a whole, without padding: what an all-reduce sums, what an
    all-gather puts together, what a reduce-scatter sums before it is cut up, what an all-to-all or a permutation
    passes on. On a ring of n devices, each sends 2 (n - 1) / n of that for an all-reduce, (n - 1) / n for a gather,
    a scatter or an all-to-all, and all of it otherwise. An operation that is started and completed later counts once,
    one inside a loop as often as the loop runs, where that is known. Operations among one device are none.

    Args:
        hlo: `compiled.as_text()`.
    """
    operations: dict[tuple[str, str], tuple[str, int, float]] = {}  # by kind and channel: computation, volume, sent
    started: dict[str, tuple[str, int]] = {}  # channel and devices of an operation that is completed later, by its name
    devices = int(match[1]) if (match := re.search(r"\bnum_partitions=(\d+)", hlo)) else 1
    for computation, name, rest in instructions(hlo):
        if collective := _COLLECTIVE.search(rest):
            kind, phase, operand = collective.groups()
            if phase == "-done":
                channel, group = started[operand]
            else:
                channel = match[1] if (match := _CHANNEL.search(rest)) else name
                group = _group_size(rest, devices)
            if phase == "-start":  # what is done has the result's shape
                started[name] = channel, group
            elif group > 1:
                volume = _array_bytes(rest[: collective.start()])
                if kind == "reduce-scatter":
                    volume *= group
                elif computation.startswith("all-reduce-scatter"):  # a TPU's fusion: what it leaves is cut up at once
                    kind = "reduce-scatter"
                # a TPU works on one operation in several fusions, each of which repeats it
                operations[kind, channel] = computation, volume, volume * _sent(kind, group)
    times = runs(hlo)
    totals: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0])
    for (kind, _), (computation, volume, sent) in operations.items():
        for i, value in enumerate((1, volume, sent)):
            totals[kind][i] += times.get(computation, 0) * value
    by_volume = sorted(totals.items(), key=lambda item: -item[1][1])
    return {kind: Traffic(int(calls), int(volume), sent) for kind, (calls, volume, sent) in by_volume}


def _sent(kind: str, group: int) -> float:
    """The share of an operation's volume that leaves each of the devices on a ring."""
    if kind in ("collective-permute", "collective-broadcast"):
        return 1
    return (2 if kind == "all-reduce" else 1) * (group - 1) / group


def _array_bytes(shape: str) -> int:
    """Bytes of all arrays in a shape such as `(bf16[8,96]{1,0}, f32[])`."""
    total = 0
    for dtype, bits, sizes in _ARRAY.findall(shape):
        elements = math.prod(int(size) for size in sizes.split(",") if size)
        total += -(-elements * (8 if dtype == "pred" else int(bits)) // 8)
    return total


def _group_size(attributes: str, devices: int) -> int:
    """The devices that an operation spans, from the attribute `replica_groups` in any of its three notations."""
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):  # [groups, devices in each]
        return int(match[1])
    # the axes of a mesh, and those that are spanned: mesh['a'=2,'b'=4], device_ids=([8]) {'b'}
    if match := re.search(r"replica_groups=[@\w]*\[([^\]]*)\](?:, device_ids=\S*)? ?\{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
        # a part of an axis is written 'a':(1)2, its size last
        spanned = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part) if part else sizes[name] for name, part in spanned)
    return devices
