"""The goals, and the lines under tables that say where they are reached and where they are missed."""

from collections.abc import Sequence

from benchmarks.result import Result, best, counts, name_of, peak_bytes, rounds, share_of_peak, times_as_fast
from benchmarks.task import FLAX_FED, TIMM_FED

TIMES_AS_FAST = {"cpu": 1.0, "gpu": 1.25}  # as the best of timm: models and training steps
# On GPUs, in bfloat16:
PEAK_SHARE = {"inference": 0.50, "training": 0.45}  # of the measured matmul peak; of variant b
PEAK_MEMORY = 1.0  # of timm's best, at most; of training steps
FED_SHARE = 0.90  # of the step alone, with the input pipeline; of variants s and b
FED_TIMES_AS_FAST = 4.0  # as timm's step with timm's loader; of variant ti

DETECTION_TIMES_AS_FAST = 1.0  # as the best of torchvision: detectors and their training steps, on a CPU

DATA_TIMES_AS_FAST = 3.0  # as timm's transform, on a core


def model_verdicts(benchmark: str, results: Sequence[Result]) -> list[str]:
    """Where the fastest side of Flax reaches the goals of models and training steps, and where it does not."""
    ratios: dict[str, list[tuple[str, float]]] = {device: [] for device in TIMES_AS_FAST}
    shares, memory = [], []
    for result in results:
        name, timed = name_of(result), rounds(result)
        ours, theirs = best(result, "flax"), best(result, "timm")
        if counts(result) and ours and theirs:
            ratios[result["device"]].append((name, times_as_fast(timed[ours], timed[theirs])["ratio"]))
            if _on_gpu(result) and peak_bytes(result, ours) and peak_bytes(result, theirs):
                memory.append((name, peak_bytes(result, ours) / peak_bytes(result, theirs)))
        share = share_of_peak(result, ours)
        if _on_gpu(result) and result["variant"] == "b" and not result["disturbed"] and share is not None:
            shares.append((name, share))
    lines = []
    for device, times in TIMES_AS_FAST.items():
        lines += verdict(f"{times} times timm's best", ratios[device], times)
    least = PEAK_SHARE[benchmark]
    lines += verdict(f"{least:.0%} of the matmul peak", shares, least, as_text=".1%")
    if benchmark == "training":
        lines += verdict("the peak memory of timm's best at most", memory, PEAK_MEMORY, at_most=True)
    return lines


def fed_verdicts(results: Sequence[Result]) -> list[str]:
    """Where the faster of Flax's pipelines reaches the goals of the end-to-end benchmark, and where it does not."""
    shares, ratios = [], []
    for result in filter(_on_gpu, results):
        timed, fed = rounds(result), best(result, tuple(FLAX_FED))
        if fed is None or result["disturbed"]:
            continue
        name, alone = f"{result['variant']} at batch {result['batch_size']}", result["step_alone"][fed]
        if result["variant"] in ("s", "b") and alone in timed:
            shares.append((name, times_as_fast(timed[fed], timed[alone])["ratio"]))
        if result["variant"] == "ti" and TIMM_FED in timed:
            ratios.append((name, times_as_fast(timed[fed], timed[TIMM_FED])["ratio"]))
    return [
        *verdict(f"{FED_SHARE:.0%} of the step alone", shares, FED_SHARE, as_text=".1%"),
        *verdict(f"{FED_TIMES_AS_FAST} times timm's loader", ratios, FED_TIMES_AS_FAST),
    ]


def _on_gpu(result: Result) -> bool:
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
