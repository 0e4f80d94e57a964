"""Results as JSON, in one shape for all benchmarks, and the figures that follow from their rounds.

    {"benchmark": …, "date": …, "commit": …, "machine": {…}, "software": {…}, "results": [
        {"variant": …, …, "reference": SIDE, "disturbed": …, "sides": {SIDE: {"failure": null, "seconds": […], …}}}]}

A result is what was measured at a time: the settings of its task, and of each side the seconds per call, round by
round. All other figures of the tables are computed from these. Imports no framework.
"""

import contextlib
import importlib.metadata
import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.rounds import Measured
from benchmarks.task import usable_cores
from crossvit_jax.files import read_json
from train.run.provenance import commit

Content = Mapping[str, Any]  # of a JSON file
Result = Mapping[str, Any]

# Cores that other programs may keep busy: above this ratios mean nothing, and are shown with a warning. To take turns
# does not help against that: torch's threads wait for each other at the end of every operation, so one that is denied
# its core holds up all.
ACCEPTED_OTHERS = 0.05 * os.cpu_count()


def is_result(file: Path) -> bool:
    """Whether a benchmark wrote it; or nobody did: it is empty, as `mktemp` makes it."""
    try:
        content = read_json(file, empty={"benchmark": None})
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "benchmark" in content


def as_json(benchmark: str, measured: Sequence[Measured]) -> Content:
    """Everything that a benchmark measured, with every round, in plain types."""
    ready = [times.ready for one in measured for times in one.sides.values() if times.ready]
    facts = {name: fact for one in ready for name, fact in one.facts.items()}
    return about(benchmark, facts) | {"results": [_result(one) for one in measured]}


def _result(measured: Measured) -> Result:
    sides, others = measured.sides, measured.others
    known = [times.ready for times in sides.values() if times.ready]
    return measured.task.told() | {
        "reference": measured.reference,
        "others_cores": others,
        "disturbed": others is not None and others > ACCEPTED_OTHERS,
        # of the model, the same for every side that can tell
        "flops_per_call": next((ready.flops for ready in known if ready.flops), None),
        # of the fastest large matrix product that a side measured in the task's dtype
        "peak_flops": max((ready.peak_flops for ready in known if ready.peak_flops), default=None),
        "images_per_call": measured.task.batch_size,
        "sides": {side: times.as_json() for side, times in sides.items()},
    }


def one_result(benchmark: str, told: Mapping[str, Any], sides: Mapping[str, dict], **facts: str) -> Content:
    """The content of a benchmark with a single result: of each side `seconds` per call, and what else is known."""
    sides = {side: {"failure": None, **known} for side, known in sides.items()}
    return about(benchmark, facts) | {"results": [{"disturbed": False, **told, "sides": sides}]}


# --- where and with what it was measured ---


def about(benchmark: str, facts: Mapping[str, str]) -> dict[str, Any]:
    """The head of a JSON file: which benchmark, when, of which commit, on what, with which versions.

    What the sides told of themselves (`Program.facts`) goes before what is installed here.
    """
    machine = {"cpu": _cpu_model(), "cores": os.cpu_count(), "usable_cores": usable_cores()}
    installed = {str(found.name): found.version for found in importlib.metadata.distributions()}
    versions = {name: installed[name] for name in ("jax", "jaxlib", "flax", "torch", "timm") if name in installed}
    return {
        "benchmark": benchmark,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine | {"system": platform.platform(terse=True)},
        "software": {"python": platform.python_version(), **versions, **facts},
    }


def _cpu_model() -> str:
    with contextlib.suppress(OSError, StopIteration):  # not Linux
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def where(contents: Sequence[Content]) -> str:
    """What `described` says of JSON files that are alike, and when and of which commits they are."""
    days = {content["date"][:10]: None for content in contents if content.get("date")}
    commits = {f"commit {content['commit']}": None for content in contents if content.get("commit")}
    return "; ".join(part for part in (described(contents[0]), ", ".join([*days, *commits])) if part)


def described(content: Content) -> str:
    """Machine, versions and threads of a JSON file: where two files differ in any of them, so do these words."""
    machine, facts = content["machine"], content["software"]
    versions = [f"{name} {version}" for name, version in facts.items() if not name.endswith((" threads", " device"))]
    threads = [f"{name.removesuffix(' threads')} {count}" for name, count in facts.items() if name.endswith(" threads")]
    place = [*gpus(content)[:1], machine["cpu"], f"{machine['usable_cores']} of {machine['cores']} cores"]
    told = [", ".join(place), ", ".join(versions)] + ([f"threads: {', '.join(threads)}"] if threads else [])
    return "; ".join(told)


def gpus(content: Content) -> list[str]:
    """What the sides call the devices that they ran on, but for the CPU."""
    return [fact for name, fact in content["software"].items() if name.endswith(" device") and fact != "cpu"]


# --- what the rounds say ---


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, smallest and largest."""
    return statistics.median(values), min(values), max(values)


def rounds(result: Result) -> dict[str, list[float]]:
    """Seconds per call, round by round, of the sides that did not fail."""
    return {name: side["seconds"] for name, side in result["sides"].items() if side["failure"] is None}


def best(result: Result, whose: str) -> str | None:
    """The side with the smallest median of those whose name begins so; None if all failed."""
    medians = {name: statistics.median(times) for name, times in rounds(result).items() if name.startswith(whose)}
    return min(medians, key=medians.get, default=None)


def failed(result: Result, whose: str = "") -> list[str]:
    """The sides of `whose` that failed: the best of the rest may not be the best there is."""
    return [name for name in result["sides"] if name.startswith(whose) and name not in rounds(result)]


def images_per_s(result: Result, side: str) -> tuple[float, float, float]:
    """Median, smallest and largest; the median is that of the time, so that ratios are those of `times_as_fast`."""
    median, least, most = spread(rounds(result)[side])
    return tuple(result["images_per_call"] / seconds for seconds in (median, most, least))


def times_as_fast(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """How many times as fast a side is as another, from the seconds that each took, round by round; and the range.

    The ratio is that of the medians, so that whoever has these can compute it. The range is that of the ratios in each
    round, whose calls were slowed by the same other programs; it always holds the ratio of the medians.
    """
    by_round = [b / a for a, b in zip(ours, theirs, strict=True)]
    return statistics.median(theirs) / statistics.median(ours), min(by_round), max(by_round)


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(cells)} |" for cells in (titles, ["---"] * len(titles), *rows)]
