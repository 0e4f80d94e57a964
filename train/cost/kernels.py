"""The kernels of a program compiled for GPUs, read off its text: what each reads, writes and computes."""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from train.cost.hlo import Array, arrays, entry, instructions

# what no kernel is launched for
_FREE = ("parameter", "constant", "get-tuple-element", "bitcast", "tuple", "after-all", "partition-id", "replica-id")
_CALLS = ("while", "conditional", "call")
_SLICES = ("slice", "dynamic-slice", "gather")
_VIEWS = ("bitcast", "reshape", "copy", "transpose")  # inside a fusion, where they move nothing

_OPERATION = re.compile(r"^(\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_NAME = re.compile(r"%([\w.\-]+)")
_FUSED = re.compile(r"\bcalls=%?([\w.\-]+)")
_INNER = re.compile(r"\b(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_TARGET = re.compile(r'custom_call_target="([^"]+)"')
_KIND = re.compile(r"\bkind=(k\w+)")
_BACKEND_KIND = re.compile(r'"fusion_backend_config":\{"kind":"([^"]+)"')
_CONTRACTED = re.compile(r'lhs_contracting_dim(?:ension)?s"?[:=][\[{]([\d,"]*)[\]}]')
_LABELS = re.compile(r"dim_labels=\w+_\w+->(\w+)")
_ESTIMATES = re.compile(r'"reification_cost":(\[[^\]]*\])')
_FRAME = re.compile(r"\bstack_frame_id=(\d+)")
_PROJECT = re.compile(r"/(?:crossvit_jax|train)/(?:.*/)?([^/]+\.py)$")


@dataclass(frozen=True)
class Kernel:
    """A kernel, or a call of a library, that a program runs."""

    name: str
    kind: str  # of a fusion, such as kLoop or __triton; the target of a library's call; otherwise the operation
    place: str  # the innermost function of this project that it comes from, such as `resize.py:resize`; or nothing
    times: int  # that it runs
    read: int  # bytes, each operand once, of what is only sliced the slices
    written: int  # bytes
    flops: int  # of matrix products, convolutions and fused attention
    dtype: str  # of their operands
    results: tuple[Array, ...]
    estimates: Mapping[str, float]  # XLA's own, in microseconds, by their name: "sol" are measured tables

    @property
    def is_product(self) -> bool:
        return "cublas" in self.kind or "gemm" in self.kind

    @property
    def is_fused_attention(self) -> bool:
        return "fmha" in self.kind


@dataclass(frozen=True)
class _Instruction:
    name: str
    operation: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    rest: str  # from the operands on


_Computation = dict[str, _Instruction]  # by name, in the text's order: the result is the last


def kernels(hlo: str) -> list[Kernel]:
    """The kernels of a program for GPUs. Of a choice the longer branch counts, loops as often as is known.

    Bytes are counted as if nothing stayed in a cache between two kernels.

    Args:
        hlo: `compiled.as_text()`.
    """
    computations = _computations(hlo)
    places = _places(hlo)
    return list(_run(computations, entry(hlo), 1, places))


def _computations(hlo: str) -> dict[str, _Computation]:
    computations: dict[str, _Computation] = defaultdict(dict)
    for computation, name, text in instructions(hlo):
        if parts := _OPERATION.match(text):
            shape, operation, rest = parts.groups()
            operands = tuple(_NAME.findall(rest[: _closing(rest)]))
            results = tuple(arrays(shape))
            computations[computation][name] = _Instruction(name, operation, results, operands, rest)
    return computations


def _closing(text: str) -> int:
    """Where the parenthesis closes that was opened before the text."""
    depth = 1
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return place
    return len(text)


def _run(
    computations: Mapping[str, _Computation], name: str, times: int, places: Mapping[str, str]
) -> Iterator[Kernel]:
    for instruction in computations[name].values():
        operation, rest = instruction.operation, instruction.rest
        if operation in _FREE or operation.endswith(("-done", "-update")):
            continue
        if operation in _CALLS or (operation.endswith("-start") and _FUSED.search(rest)):
            trips = _TRIPS.search(rest)
            inner = _INNER.findall(rest) + [
                n for names in _BRANCHES.findall(rest) for n in re.findall(r"[\w.\-]+", names)
            ]
            if operation == "conditional":
                inner = [max(inner, key=lambda branch: len(computations[branch]))]
            for called in inner:
                yield from _run(computations, called, times * (int(trips[1]) if trips else 1), places)
        else:
            yield _kernel(instruction, computations, name, times, places)


def _kernel(
    instruction: _Instruction,
    computations: Mapping[str, _Computation],
    computation: str,
    times: int,
    places: Mapping[str, str],
) -> Kernel:
    around, rest = computations[computation], instruction.rest
    operands = [around[name] for name in instruction.operands if name in around]
    fused = computations.get(match[1]) if (match := _FUSED.search(rest)) else None
    kind = _kind(instruction)
    if fused is None:
        read = sum(array.bytes for operand in operands for array in operand.results)
    else:
        read = sum(_bytes_read(fused, place, operand) for place, operand in enumerate(operands))
    flops, dtype = _arithmetic(
        kind, instruction, [operand.results[0] for operand in operands if operand.results], fused
    )
    frame = _FRAME.search(rest)
    estimates = json.loads(match[1]) if (match := _ESTIMATES.search(rest)) else []
    return Kernel(
        name=instruction.name,
        kind=kind,
        place=places.get(frame[1], "") if frame else "",
        times=times,
        read=read,
        written=_bytes_written(kind, instruction, fused),
        flops=flops,
        dtype=dtype,
        results=instruction.results,
        estimates={estimate["name"]: estimate["exec_time_us"] for estimate in estimates},
    )


def _kind(instruction: _Instruction) -> str:
    if target := _TARGET.search(instruction.rest):
        return target[1]
    kind = _KIND.search(instruction.rest)
    if kind is None:
        return instruction.operation
    backend = _BACKEND_KIND.search(instruction.rest)
    return backend[1] if kind[1] == "kCustom" and backend else kind[1]


# --- bytes ---


def _bytes_read(fused: _Computation, place: int, operand: _Instruction) -> int:
    """Bytes of a fusion's operand that it reads: no more than the slices, where nothing else is done with it."""
    whole = sum(array.bytes for array in operand.results)
    parameter = next((i for i in fused.values() if i.operation == "parameter" and i.rest.startswith(f"{place})")), None)
    if parameter is None:
        return whole
    total, names = 0, [parameter.name]
    while names:
        name = names.pop()
        for user in fused.values():
            if name not in user.operands:
                continue
            if user.operation in _SLICES and user.operands[0] == name:
                total += sum(array.bytes for array in user.results)
            elif user.operation in _VIEWS:
                names.append(user.name)
            elif user.operation != "dynamic-update-slice" or name in user.operands[1:]:  # it writes into the first
                return whole
    return min(total, whole)


def _bytes_written(kind: str, instruction: _Instruction, fused: _Computation | None) -> int:
    if kind.startswith("__cublas"):  # the second result is room to work in
        return instruction.results[0].bytes
    last = list(fused.values())[-1] if fused else None
    if last is not None and last.operation == "dynamic-update-slice":  # in place
        return sum(array.bytes for array in fused[last.operands[1]].results)
    return sum(array.bytes for array in instruction.results)


# --- FLOPs ---


def _arithmetic(
    kind: str, instruction: _Instruction, operands: list[Array], fused: _Computation | None
) -> tuple[int, str]:
    """FLOPs, two per multiply-add, and the dtype of what is multiplied."""
    result = instruction.results[0] if instruction.results else None
    if "fmha" in kind:  # queries and keys (batch, tokens, heads, width); backward five products instead of two
        queries, keys = operands[0], operands[1]
        products = 5 if "Backward" in kind else 2
        return products * 2 * queries.size * keys.shape[1], queries.dtype
    if "cublas" in kind:
        return 2 * result.size * _contracted(instruction, operands[0]), operands[0].dtype
    if "cudnn$conv" in kind:
        return _convolution(kind, instruction, operands)
    if fused is not None:
        dots = [i for i in fused.values() if i.operation == "dot"]
        lefts = [fused[dot.operands[0]].results[0] for dot in dots]
        flops = sum(2 * dot.results[0].size * _contracted(dot, left) for dot, left in zip(dots, lefts, strict=True))
        return flops, lefts[0].dtype if lefts else "f32"
    return 0, "f32"


def _contracted(product: _Instruction, left: Array) -> int:
    axes = _CONTRACTED.search(product.rest)
    return prod(left.shape[int(axis)] for axis in re.findall(r"\d+", axes[1])) if axes else 1


def _convolution(kind: str, instruction: _Instruction, operands: list[Array]) -> tuple[int, str]:
    """As many multiply-adds for each number of the output as the kernel has numbers for one of its channels."""
    if "BackwardFilter" in kind:
        output, weights = operands[1], instruction.results[0]
    elif "BackwardInput" in kind:
        output, weights = operands[0], operands[1]
    else:
        output, weights = instruction.results[0], operands[1]
    channels = output.shape[_LABELS.search(instruction.rest)[1].index("f")]
    return 2 * output.size * weights.size // channels, operands[0].dtype


# --- places ---


def _places(hlo: str) -> dict[str, str]:
    """By the number of a stack frame, the file and name of its innermost function of this project."""
    tables: dict[str, dict[str, str]] = defaultdict(dict)
    title = ""
    for line in hlo.splitlines():
        if line.startswith(("%", "ENTRY")):
            break
        if re.fullmatch(r"[A-Za-z]+", line):
            title = line
        elif row := re.match(r"^(\d+) (.*)$", line):
            tables[title][row[1]] = row[2]

    def number(row: str, field: str) -> str:
        found = re.search(rf"\b{field}=(\d+)", row)
        return found[1] if found else ""

    def place(frame: int) -> str:
        while row := tables["StackFrames"].get(str(frame)):
            location = tables["FileLocations"][number(row, "file_location_id")]
            file = _PROJECT.search(tables["FileNames"][number(location, "file_name_id")].strip('"'))
            if file:
                return f"{file[1]}:{tables['FunctionNames'][number(location, 'function_name_id')].strip(chr(34))}"
            frame = int(number(row, "parent_frame_id") or 0) - 1  # 0 is none here, and 1 the first frame
        return ""

    return {frame: place(int(frame)) for frame in tables["StackFrames"]}
