"""The measurements as Markdown for people and as JSON for everything else."""

import json
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import Measured, Times
from benchmarks.task import usable_cores
from train.whole_file import write_whole

_HEADER = ["variant", "batch", "dtype", "side", "ms per call, median (min-max)", "images/s", "Flax is", "difference"]


def machine() -> dict[str, Any]:
    """The processor and the cores that this process may use."""
    cores = {"cores": os.cpu_count(), "usable_cores": usable_cores()}
    return {"cpu": _cpu_model(), **cores, "system": platform.platform(terse=True)}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes what `as_json` returns: whole, or not at all."""
    write_whole(path, f"{json.dumps(content, indent=2)}\n".encode())


def as_json(benchmark: str, results: Sequence[Measured]) -> dict[str, Any]:
    """Everything measured, with every round, in plain types."""
    return {
        "benchmark": benchmark,
        "machine": machine(),
        "software": software(results),
        "results": [
            {
                "variant": measured.task.variant,
                "batch_size": measured.task.batch_size,
                "dtype": measured.task.dtype,
                "device": measured.task.device,
                "compared_with": measured.reference,
                "sides": {side: _side(measured, side) for side in measured.sides},
                "others_cores": measured.others,
                "disturbed": measured.disturbed,
                "best_timm": measured.best_timm,
                "flax_times_as_fast": {
                    side: spread(ratio)
                    for side in measured.timed
                    if side != "flax" and (ratio := measured.ratio(side)) is not None
                },
            }
            for measured in results
        ],
    }


def as_markdown(benchmark: str, results: Sequence[Measured]) -> str:
    """A line on the machine and a table with a row per side."""
    facts = software(results)
    about = machine()
    device = next((facts[name] for name in ("torch device", "jax device") if facts.get(name, "cpu") != "cpu"), None)
    versions = ", ".join(f"{name} {facts[name]}" for name in ("jax", "torch", "timm") if name in facts)
    threads = ", ".join(f"{name} {facts[f'{name} threads']}" for name in ("jax", "torch") if f"{name} threads" in facts)
    lines = [
        f"CrossViT {benchmark} on {f'{device}; ' if device else ''}{about['cpu']}, {about['usable_cores']} of "
        f"{about['cores']} cores; {versions}; threads: {threads}",
        "",
        _row(_HEADER),
        _row("---" for _ in _HEADER),
    ]
    lines += [_row(_cells(measured, side)) for measured in results for side in measured.sides]
    disturbed = [measured.others for measured in results if measured.disturbed]
    if disturbed:
        lines += [
            "",
            f"**Not valid as a comparison**: other programs kept {max(disturbed):.1f} of {about['cores']} cores busy "
            "meanwhile, which slows the sides unequally. Measure again on an idle machine.",
        ]
    return "\n".join(lines)


def software(results: Sequence[Measured]) -> dict[str, str]:
    """Versions, threads and devices, as the sides told them."""
    facts: dict[str, str] = {}
    for measured in results:
        for times in measured.sides.values():
            facts |= times.ready.facts if times.ready else {}
    return facts


def _side(measured: Measured, side: str) -> dict[str, Any]:
    times = measured.sides[side]
    known: dict[str, Any] = {"failure": times.failure}
    if times.ready:
        ready = times.ready
        known |= {"load_s": ready.load_s, "first_result_s": ready.first_s, "warm_up_s": ready.warm_up_s}
        known |= {"calls_per_round": ready.calls, "difference": times.difference, "rounds_s_per_call": times.seconds}
        known["others_cores"] = [turn.others for turn in times.rounds]
    if times.failure is None:
        known |= {f"{name}_s_per_call": value for name, value in spread(times.seconds).items()}
        known["images_per_s"] = measured.task.batch_size / times.median
    return known


def _cells(measured: Measured, side: str) -> list[str]:
    task, times = measured.task, measured.sides[side]
    cells = [task.variant, str(task.batch_size), task.dtype, side]
    if times.failure is not None:
        return [*cells, f"failed: {times.failure.replace('|', '/')}", "", "", ""]
    milliseconds = {name: 1000 * value for name, value in spread(times.seconds).items()}
    return [
        *cells,
        "{median:.2f} ({min:.2f}-{max:.2f})".format(**milliseconds),
        f"{task.batch_size / times.median:.1f}",
        _ratio(measured, side),
        _difference(measured, side, times),
    ]


def _ratio(measured: Measured, side: str) -> str:
    """How many times as fast Flax is, the median over rounds and its spread."""
    ratios = None if side == "flax" else measured.ratio(side)
    if ratios is None:
        return ""
    best = " **← best of timm**" if side == measured.best_timm else ""
    return "{median:.2f}x as fast ({min:.2f}-{max:.2f})".format(**spread(ratios)) + best


def _difference(measured: Measured, side: str, times: Times) -> str:
    if side == measured.reference:
        return "reference"
    return "" if times.difference is None else f"{times.difference:.1e}"


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _row(cells) -> str:
    return f"| {' | '.join(cells)} |"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()
