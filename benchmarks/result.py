"""Results as JSON: where they were measured, the figures of each side, and the ratios that follow from its rounds.

A result is an entry of `results` in a JSON file. Sides whose names begin with "flax" are ours, those that begin with
"timm" timm's. Imports no framework.
"""

import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.rounds import ACCEPTED_OTHERS, Measured, Times, cores_of_others
from benchmarks.task import DetectionTask, Task, usable_cores
from convert.files import write_whole
from crossvit_jax.files import read_json
from train.run.provenance import commit, output_of

Content = Mapping[str, Any]  # of a JSON file
Result = Mapping[str, Any]

_PACKAGES = ("jax", "jaxlib", "flax", "torch", "timm", "libtpu")
_CUDA_LIBRARIES = {"CUDA": "nvidia-cuda-runtime", "cuDNN": "nvidia-cudnn"}  # the first part of the wheels' names


def write_json(path: Path | None, content: Content) -> None:
    """Writes it whole, or not at all, if there is a path. Raises NotWritten if that is impossible."""
    if path is not None:
        write_whole(path, f"{json.dumps(content, indent=2)}\n".encode())


def is_result(file: Path) -> bool:
    """Whether a benchmark wrote it; or nobody did: it is empty, as `mktemp` makes it."""
    try:
        content = read_json(file, empty={"benchmark": None})
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "benchmark" in content


def as_json(benchmark: str, results: Sequence[Measured]) -> dict[str, Any]:
    """Everything measured of models and training steps, with every round, in plain types."""
    facts = told_facts(times for measured in results for times in measured.sides.values())
    return about(benchmark, facts) | {"results": [_result(measured) for measured in results]}


def _result(measured: Measured) -> dict[str, Any]:
    task, sides = measured.task, measured.sides
    told = [times.ready for times in sides.values() if times.ready]
    result = task_as_json(task, sides) | {
        "compared_with": measured.reference,
        "sides": {side: side_as_json(times, task.batch_size) for side, times in sides.items()},
        # of the model: the same for every side that can tell, see `Program.flops`
        "flops_per_call": next((ready.flops_per_call for ready in told if ready.flops_per_call), None),
        # of the fastest large matrix product that a side measured in the task's dtype
        "peak_flops": max((ready.peak_flops for ready in told if ready.peak_flops), default=None),
    }
    best_timm, timed = best(result, "timm"), rounds(result)
    ratios = {side: times_as_fast(ours, timed[best_timm]) for side, ours in timed.items()} if best_timm else {}
    return result | {"best_timm": best_timm, "times_as_fast_as_best_timm": ratios}


def task_as_json(task: Task | DetectionTask, sides: Mapping[str, Times]) -> dict[str, Any]:
    """What was measured, and whether other programs disturbed it: of models, and of steps fed from files."""
    others = cores_of_others(sides)
    return {
        "variant": task.variant,
        "batch_size": task.batch_size,
        "dtype": task.dtype,
        "device": task.device,
        "others_cores": others,
        "disturbed": others is not None and others > ACCEPTED_OTHERS,
    }


def side_as_json(times: Times, images: int) -> dict[str, Any]:
    """What is known of a side whose calls are of so many images, in every benchmark."""
    known: dict[str, Any] = {"failure": times.failure}
    if times.ready:
        ready = times.ready
        known |= {"load_s": ready.load_s, "first_result_s": ready.first_s, "warm_up_s": ready.warm_up_s}
        known |= {"calls_per_round": ready.calls, "rounds_s_per_call": times.seconds}
        known |= {"others_cores": [turn.others for turn in times.rounds], "peak_bytes": ready.peak_bytes}
        known |= {"difference": times.difference, "from_float32": times.from_float32}
    if times.failure is None:
        known |= {f"{name}_s_per_call": value for name, value in spread(times.seconds).items()}
        known["images_per_s"] = images / known["median_s_per_call"]
    return known


def told_facts(sides: Iterable[Times]) -> dict[str, str]:
    """Versions, threads and devices, as the sides told them."""
    return {name: fact for times in sides if times.ready for name, fact in times.ready.facts.items()}


# --- where and with what it was measured ---


def about(benchmark: str, facts: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The head of a JSON file: which benchmark, when, of which commit, on what, with which versions.

    Args:
        benchmark: its module in `benchmarks`.
        facts: what the sides told of themselves (`Program.facts`); goes before what is installed here.
    """
    gpus = _gpus()
    return {
        "benchmark": benchmark,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "usable_cores": usable_cores(),
            "system": platform.platform(terse=True),
        }
        | ({"gpus": gpus} if gpus else {}),
        "software": _versions(with_cuda=bool(gpus)) | dict(facts or {}),
    }


def _versions(*, with_cuda: bool) -> dict[str, str]:
    """Of Python and of the packages that are installed; of CUDA's libraries as jax and torch get them from wheels."""
    installed = {str(found.name): found.version for found in importlib.metadata.distributions()}
    versions = {"python": platform.python_version()}
    versions |= {name: installed[name] for name in _PACKAGES if name in installed}
    for library, prefix in _CUDA_LIBRARIES.items() if with_cuda else ():
        # several where jax and torch were built for different ones
        several = sorted({version for name, version in installed.items() if name.startswith(prefix)})
        if several:
            versions[library] = ", ".join(several)
    return versions


def _gpus() -> list[dict[str, Any]]:
    """Name, memory and driver of each NVIDIA GPU."""
    told = output_of("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits")
    rows = [[cell.strip() for cell in line.split(",")] for line in (told or "").splitlines()]
    return [
        {"name": name, "memory_bytes": int(mebibytes) * 2**20, "driver": driver}
        for name, mebibytes, driver in (row for row in rows if len(row) == 3 and row[1].isdigit())
    ]


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def where(*contents: Content) -> str:
    """What `described` says of JSON files that are alike, and when and of which commits they are."""
    return "; ".join(part for part in (described(contents[0]), dated(contents)) if part)


def described(content: Content) -> str:
    """Machine, versions and threads of a JSON file: where two files differ in any of them, so do these words."""
    machine, facts = content["machine"], content.get("software", {})
    devices = [_gpu_in_words(gpu) for gpu in machine.get("gpus", [])] or _told_devices(content)
    versions = [f"{name} {version}" for name, version in facts.items() if not name.endswith((" threads", " device"))]
    threads = [f"{name.removesuffix(' threads')} {count}" for name, count in facts.items() if name.endswith(" threads")]
    parts = [
        ", ".join([*devices, machine["cpu"], f"{machine['usable_cores']} of {machine['cores']} cores"]),
        ", ".join(versions),
        f"threads: {', '.join(threads)}" if threads else "",
    ]
    return "; ".join(part for part in parts if part)


def device_name(content: Content, device: str) -> str:
    """What the maker calls the device of a JSON file's results, which is "cpu" or "gpu"."""
    if device == "cpu":
        return content["machine"]["cpu"]
    return next((gpu["name"] for gpu in content["machine"].get("gpus", [])), ", ".join(_told_devices(content)) or "GPU")


def dated(contents: Sequence[Content]) -> str:
    """Days and commits of JSON files, such as "2026-11-25, commit 0123456789ab"; empty for files that do not tell."""
    days = {content["date"][:10]: None for content in contents if content.get("date")}
    commits = {content["commit"]: None for content in contents if content.get("commit")}
    return ", ".join([*days, *(f"commit {commit}" for commit in commits)])


def _gpu_in_words(gpu: Mapping[str, Any]) -> str:
    return f"{gpu['name']} ({gpu['memory_bytes'] / 2**30:.0f} GiB, driver {gpu['driver']})"


def _told_devices(content: Content) -> list[str]:
    """What a side said that it runs on, if that is not the CPU: known without nvidia-smi too."""
    facts = content.get("software", {})
    told = (facts.get(f"{framework} device", "cpu") for framework in ("torch", "jax"))
    return [name for name in told if name != "cpu"][:1]


# --- what the rounds say ---


def name_of(result: Result) -> str:
    """Variant, batch size and precision, such as "ti at batch 8 in bfloat16"."""
    name = f"{result['variant']} at batch {result['batch_size']}"
    return name if result["dtype"] == "float32" else f"{name} in {result['dtype']}"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def rounds(result: Result) -> dict[str, list[float]]:
    """Seconds per call, round by round, of the sides that did not fail."""
    return {name: side["rounds_s_per_call"] for name, side in result["sides"].items() if side["failure"] is None}


def best(result: Result, whose: str | tuple[str, ...]) -> str | None:
    """The side with the smallest median of those whose name begins so; None if all failed."""
    medians = {name: statistics.median(times) for name, times in rounds(result).items() if name.startswith(whose)}
    return min(medians, key=medians.get, default=None)


def failed(result: Result, whose: str) -> list[str]:
    """The sides of `whose` that failed: the best of the rest may not be the best there is."""
    return [name for name in result["sides"] if name.startswith(whose) and name not in rounds(result)]


def peak_bytes(result: Result, side: str) -> int | None:
    """The most device memory that a side used, where it is known."""
    return result["sides"][side].get("peak_bytes")


def share_of_peak(result: Result, side: str | None) -> float | None:
    """The FLOPs per second of a side, as a share of the device's peak, where both are known."""
    flops, peak, times = result.get("flops_per_call"), result.get("peak_flops"), rounds(result).get(side)
    return flops / spread(times)["median"] / peak if flops and peak and times else None


def counts(result: Result) -> bool:
    """Whether its ratios are those to timm at its best, on a machine that had nothing else to do."""
    return not result["disturbed"] and not failed(result, "timm")


def images_per_s(seconds: Sequence[float], images: int) -> dict[str, float]:
    """`spread` as images per second, where each round takes so many seconds for `images`: median is that of the time.

    So the ratio of two medians is that of `times_as_fast`, whatever the number of rounds.
    """
    times = spread(seconds)
    return {"median": images / times["median"], "min": images / times["max"], "max": images / times["min"]}


def times_as_fast(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """How many times as fast a side is as another, from the seconds that each took, round by round.

    The ratio is that of the medians, so that whoever has these can compute it. The range is that of the ratios in each
    round, whose calls were slowed by the same other programs; it always holds the ratio of the medians.
    """
    by_round = [b / a for a, b in zip(ours, theirs, strict=True)]
    return {"ratio": statistics.median(theirs) / statistics.median(ours), "min": min(by_round), "max": max(by_round)}


# --- tables ---


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(cells)} |" for cells in (titles, ["---"] * len(titles), *rows)]


def in_words(figures: Mapping[str, float], as_text: str = ".2f") -> str:
    """Of `spread`, `images_per_s` or `times_as_fast`: the first figure, and the range in brackets."""
    first, smallest, largest = (format(value, as_text) for value in figures.values())
    return f"{first} ({smallest}-{largest})"
