"""What a result's rounds say, as they lie in JSON: the best side of timm's, and how fast others are beside it.

A result is an entry of `results` in the JSON of `python -m benchmarks.inference` and `training`. Sides whose names
begin with "flax" are ours, those that begin with "timm" timm's.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Result = Mapping[str, Any]


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
    round, whose calls share the machine's mood; it always holds the ratio of the medians.
    """
    by_round = [b / a for a, b in zip(ours, theirs, strict=True)]
    return {
        "ratio": statistics.median(theirs) / statistics.median(ours),
        "min": min(by_round),
        "max": max(by_round),
    }
