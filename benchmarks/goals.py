"""The goals, and the lines under tables that say where they are reached and where they are missed."""

from collections.abc import Mapping, Sequence
from typing import Any

TIMES_AS_FAST = {"cpu": 1.0, "gpu": 1.25}  # as the best of timm: models and training steps
# On GPUs, in bfloat16:
PEAK_SHARE = {"inference": 0.50, "training": 0.45}  # of the measured matmul peak; of variant b
PEAK_MEMORY = 1.0  # of timm's best, at most; of training steps
FED_SHARE = 0.90  # of the step alone, with the input pipeline; of variants s and b
FED_TIMES_AS_FAST = 4.0  # as timm's step with timm's loader; of variant ti

DATA_TIMES_AS_FAST = 3.0  # as timm's transform, on a core


def on_gpu(result: Mapping[str, Any]) -> bool:
    """Whether a result of a JSON file is one that the goals for GPUs are for."""
    return result["device"] == "gpu" and result["dtype"] == "bfloat16"


def verdict(
    goal: str, ratios: Sequence[tuple[str, float]], bound: float, *, at_most: bool = False, as_text: str = ".3f"
) -> list[str]:
    """A line on a goal, after an empty one; none where there is nothing that it is for.

    Args:
        goal: in words.
        ratios: what they were measured of, and each.
        bound: that they should reach, or with `at_most` not exceed.
        as_text: the format of a ratio.
    """
    lists: dict[str, list[str]] = {"missed": [], "reached": []}
    for name, ratio in ratios:
        reached = ratio <= bound if at_most else ratio >= bound
        lists["reached" if reached else "missed"].append(f"{name} ({ratio:{as_text}})")
    verdicts = [f"{word} by {', '.join(names)}" for word, names in lists.items() if names]
    return ["", f"The goal, {goal}, is {'; '.join(verdicts)}."] if verdicts else []
