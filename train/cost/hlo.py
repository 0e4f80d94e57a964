"""A compiled program's text (XLA's optimised HLO), read: how often what runs, and what the devices tell each other."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(r"\b(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_CALLED_LIST = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_LOOP = re.compile(r"\bcondition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_LIMIT = re.compile(r"^s32\[\]\S* constant\((\d+)\)")
_OWN_KERNEL = 'custom_call_target="tpu_custom_call"'
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')

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
_REDUCTION = re.compile(r" (?:all-reduce|reduce-scatter)(?:-start)?\(")
_BACKWARD = "transpose(jvp("  # in the name of every operation of jax's backward pass, and of what unpacks its results
_PRODUCT = re.compile(r" custom-call\(|gemm")
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")


class Array(NamedTuple):
    """An array in a program."""

    dtype: str  # bf16, f32, pred, …
    shape: tuple[int, ...]
    bytes: int  # without padding

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def arrays(shape: str) -> list[Array]:
    """The arrays in a shape such as `(bf16[8,96]{1,0}, f32[])`."""
    found = []
    for dtype, bits, text in _ARRAY.findall(shape):
        sizes = tuple(int(size) for size in text.split(",") if size)
        found.append(Array(dtype, sizes, -(-math.prod(sizes) * (8 if dtype == "pred" else int(bits)) // 8)))
    return found


def instructions(hlo: str) -> Iterator[tuple[str, str, str]]:
    """The computation, the name and the rest of every instruction, in the order of the text.

    Args:
        hlo: `compiled.as_text()`.
    """
    computation = ""
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            computation = header[2]
        if instruction := _INSTRUCTION.match(line):
            yield computation, *instruction.groups()


def entry(hlo: str) -> str:
    """The name of the computation that a program begins with."""
    return next((match[2] for line in hlo.splitlines() if (match := _COMPUTATION.match(line)) and match[1]), "")


def runs(hlo: str) -> dict[str, int]:
    """How often each computation runs in one run of the program: loops where that is known, otherwise once.

    Both branches of a choice count.

    Args:
        hlo: `compiled.as_text()`.
    """
    callers: dict[str, list[tuple[str, int]]] = defaultdict(list)  # computation, times that it calls this one
    loops: list[tuple[str, str, str]] = []  # computation, condition, body
    limits: dict[str, list[int]] = defaultdict(list)  # the whole numbers that a computation mentions
    for computation, _, rest in instructions(hlo):
        if limit := _LIMIT.match(rest):
            limits[computation].append(int(limit[1]))
        if loop := _LOOP.search(rest):
            if trips := _TRIPS.search(rest):
                callers[loop[2]].append((computation, int(trips[1])))
            else:
                loops.append((computation, *loop.groups()))
        if " async-done(" not in rest and " async-update(" not in rest:  # these repeat what their start calls
            called = _CALLED.findall(rest)
            for names in _CALLED_LIST.findall(rest):
                called += re.findall(r"[\w.\-]+", names)
            for other in called:
                callers[other].append((computation, 1))
    for computation, condition, body in loops:
        # a TPU's program does not say how often; jax.lax.scan counts up to the one number in the condition
        callers[body].append((computation, limits[condition][0] if len(limits[condition]) == 1 else 1))

    counts: dict[str, int] = {entry(hlo): 1}

    def count(computation: str) -> int:
        if computation not in counts:
            counts[computation] = sum(times * count(caller) for caller, times in callers[computation])
        return counts[computation]

    for computation in list(callers):
        count(computation)
    return counts


def estimated_cycles(hlo: str) -> int | None:
    """The clock cycles of a device that the TPU's compiler expects the program to take, without communication.

    It writes its estimate beside every fusion, copy and product; here they are summed as often as they run, as if
    nothing overlapped. None for the programs of other devices, which carry no such estimate.

    Args:
        hlo: `compiled.as_text()`.
    """
    times = runs(hlo)
    known = [
        times.get(computation, 0) * int(cycles[1])
        for computation, _, rest in instructions(hlo)
        if (cycles := _CYCLES.search(rest))
    ]
    return sum(known) if known else None


def own_kernels(hlo: str) -> int:
    """How often a program for TPUs calls kernels that are not its compiler's: their cycles are in no estimate of it."""
    times = runs(hlo)
    return sum(times.get(computation, 0) for computation, _, rest in instructions(hlo) if _OWN_KERNEL in rest)


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


def early_reductions(hlo: str) -> tuple[int, int] | None:
    """How many reductions over devices start before the last product of the backward pass; and how many there are.

    They are looked for in the schedule of a GPU's program, where they are operations of their own, and products are
    calls of libraries or of Triton's kernels. Reductions of scalars do not count. None without any.

    Args:
        hlo: `compiled.as_text()`.
    """
    main = entry(hlo)
    wrapped = {computation for computation, _, rest in instructions(hlo) if _reduces_array(rest)} - {main}
    starts, last = [], 0
    for place, (_, _, rest) in enumerate(part for part in instructions(hlo) if part[0] == main):
        called = _CALLED.findall(rest) if " async-start(" in rest else ()
        if _reduces_array(rest) or wrapped & set(called):
            starts.append(place)
        elif _BACKWARD in rest and _PRODUCT.search(rest):
            last = place
    return (sum(place < last for place in starts), len(starts)) if starts else None


def _reduces_array(rest: str) -> bool:
    found = _REDUCTION.search(rest)
    return found is not None and any(array.shape for array in arrays(rest[: found.start()]))


def _sent(kind: str, group: int) -> float:
    """The share of an operation's volume that leaves each of the devices on a ring."""
    if kind in ("collective-permute", "collective-broadcast"):
        return 1
    return (2 if kind == "all-reduce" else 1) * (group - 1) / group


def _array_bytes(shape: str) -> int:
    """Bytes of all arrays in a shape such as `(bf16[8,96]{1,0}, f32[])`."""
    return sum(array.bytes for array in arrays(shape))


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
