"""A compiled program's text (XLA's optimised HLO), read: its instructions, and how often each of them runs."""

import re
from collections import defaultdict
from collections.abc import Iterator

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(r"\b(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_CALLED_LIST = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_LOOP = re.compile(r"\bcondition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_LIMIT = re.compile(r"^s32\[\]\S* constant\((\d+)\)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


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


def runs(hlo: str) -> dict[str, int]:
    """How often each computation runs in one run of the program: loops where that is known, otherwise once.

    Both branches of a choice count.

    Args:
        hlo: `compiled.as_text()`.
    """
    callers: dict[str, list[tuple[str, int]]] = defaultdict(list)  # computation, times that it calls this one
    loops: list[tuple[str, str, str]] = []  # computation, condition, body
    limits: dict[str, list[int]] = defaultdict(list)  # the whole numbers that a computation mentions
    entry = next((match[2] for line in hlo.splitlines() if (match := _COMPUTATION.match(line)) and match[1]), "")
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

    counts: dict[str, int] = {entry: 1}

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
