"""Models and training steps, measured: everything as JSON."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import about
from benchmarks.ratios import best, rounds, spread, times_as_fast
from benchmarks.rounds import Measured
from convert.files import write_whole


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes it whole, or not at all. Raises OSError if that is impossible."""
    write_whole(path, f"{json.dumps(content, indent=2)}\n".encode())


def as_json(benchmark: str, results: Sequence[Measured]) -> dict[str, Any]:
    """Everything measured, with every round, in plain types."""
    facts: dict[str, str] = {}
    for measured in results:
        for times in measured.sides.values():
            facts |= times.ready.facts if times.ready else {}
    return about(benchmark, facts) | {"results": [_result(measured) for measured in results]}


def _result(measured: Measured) -> dict[str, Any]:
    task = measured.task
    result = {
        "variant": task.variant,
        "batch_size": task.batch_size,
        "dtype": task.dtype,
        "device": task.device,
        "compared_with": measured.reference,
        "sides": {side: _side(measured, side) for side in measured.sides},
        "flops_per_call": measured.flops_per_call,
        "peak_flops": measured.peak_flops,
        "others_cores": measured.others,
        "disturbed": measured.disturbed,
    }
    best_timm, timed = best(result, "timm"), rounds(result)
    ratios = {side: times_as_fast(ours, timed[best_timm]) for side, ours in timed.items()} if best_timm else {}
    return result | {"best_timm": best_timm, "times_as_fast_as_best_timm": ratios}


def _side(measured: Measured, side: str) -> dict[str, Any]:
    times = measured.sides[side]
    known: dict[str, Any] = {"failure": times.failure}
    if times.ready:
        ready = times.ready
        known |= {"load_s": ready.load_s, "first_result_s": ready.first_s, "warm_up_s": ready.warm_up_s}
        known |= {"calls_per_round": ready.calls, "difference": times.difference, "rounds_s_per_call": times.seconds}
        known["others_cores"] = [turn.others for turn in times.rounds]
        known |= {"from_float32": times.from_float32, "peak_bytes": ready.peak_bytes}
    if times.failure is None:
        known |= {f"{name}_s_per_call": value for name, value in spread(times.seconds).items()}
        known["images_per_s"] = measured.task.batch_size / times.median
    return known
