"""The command `python -m benchmarks.detection`: our Flax detector against torchvision's FCOS on the same backbone.

From images to boxes, and one training step: forward, FCOS's losses, backward, AdamW. torchvision's FCOS stands on the
PyTorch twin's backbone, eager and with its networks compiled. On a CPU, in float32. Weights are random, and about a
thousand candidates of an image are above the threshold of scores.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.command import add_rounds_flags, variant_name, workers_environment, writable_json
from benchmarks.report.goals import DETECTION_TIMES_AS_FAST, verdict
from benchmarks.result import (
    Content,
    about,
    best,
    failed,
    in_words,
    markdown_table,
    rounds,
    side_as_json,
    spread,
    task_as_json,
    times_as_fast,
    told_facts,
    where,
    write_json,
)
from benchmarks.rounds import Measured, measure, say
from benchmarks.task import DETECTION_SIDES, DetectionTask
from convert.command_line import Parser, at_least_one, leave, run

_BENCHMARKS = ("inference", "training")
_OFTEN = -6.5  # the bias of classes with which about a thousand scores of an image are above 0.05
_TITLES = ("benchmark", "side", "ms per call, median (min-max)", "images/s")
_TITLES += ("times as fast as torchvision's best (min-max)", "difference")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status: 0 done; 1 the sides disagree or one failed; 2 wrong flags."""
    parser = Parser(prog="python -m benchmarks.detection", description=__doc__.split("`: ", 1)[1])
    parser.add_argument("--variant", type=variant_name, default="ti", metavar="NAME", help="default: ti")
    parser.add_argument("--batch-size", type=at_least_one, default=2, metavar="N", help="default: 2")
    parser.add_argument("--sides", nargs="+", choices=DETECTION_SIDES, default=list(DETECTION_SIDES))
    parser.add_argument(
        "--seconds",
        type=at_least_one,
        metavar="N",
        help="begin no round, but the first, that would end after N seconds",
    )
    add_rounds_flags(parser, repeats=5)
    args = parser.parse_args(argv)
    if len(set(args.sides)) < len(args.sides):
        parser.error("--sides names a side twice")
    writable_json(parser, args.json)
    return run(parser.prog, lambda: _run(args), failure=1)


def _run(args: argparse.Namespace) -> int:
    begun, results = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="crossvit-benchmark-") as folder:
        weights = Path(folder, "detector.safetensors")
        for number, benchmark in enumerate(_BENCHMARKS, 1):
            task = DetectionTask(
                benchmark=benchmark, variant=args.variant, batch_size=args.batch_size, weights=str(weights)
            )
            if number == 1:
                write_weights(task)
            say(f"CrossViT {args.variant} detector, {benchmark}")
            # each of the benchmarks has its share of the time
            until = None if args.seconds is None else begun + number / len(_BENCHMARKS) * args.seconds
            environment = workers_environment("cpu", Path(folder), one_at_a_time=False)
            results.append(measure(task, args.sides, rounds=args.repeats, until=until, environment=environment))
            content = as_json(results)
            write_json(args.json, content)
    print(as_markdown(content))
    return 1 if any(times.failure for measured in results for times in measured.sides.values()) else 0


def write_weights(task: DetectionTask) -> None:
    """Random weights of the detector, with noise in every parameter: fresh ones let mistakes pass the comparison."""
    import torch

    from convert import save
    from crossvit_torch import CrossViTDetector

    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        model = CrossViTDetector(task.config())
    tensors = {}
    for name, parameter in model.state_dict().items():
        is_norm = parameter.ndim == 1 and name.endswith("weight")
        tensors[name] = 0.02 * torch.randn(parameter.shape, generator=generator) + is_norm
    tensors["head.classification_head.cls_logits.bias"] += _OFTEN
    save(tensors, task.config(), task.weights)


def as_json(results: Sequence[Measured]) -> dict[str, Any]:
    """Everything measured, with every round, in plain types."""
    facts = told_facts(times for measured in results for times in measured.sides.values())
    return about("detection", facts) | {"results": [_result(measured) for measured in results]}


def _result(measured: Measured) -> dict[str, Any]:
    task, sides = measured.task, measured.sides
    told = {side: side_as_json(times, task.batch_size) for side, times in sides.items()}
    known = {"benchmark": task.benchmark, "image_size": task.config().image_size, "compared_with": measured.reference}
    return task_as_json(task, sides) | known | {"sides": told}


def as_markdown(content: Content) -> str:
    """A line on what was measured where, a table with a row per side, and whether the goal is reached."""
    results = content["results"]
    first = results[0]
    size = " x ".join(map(str, first["image_size"]))
    lines = [
        f"CrossViT {first['variant']} detector at {size} pixels, batch {first['batch_size']}; {where(content)}",
        "",
        *markdown_table(_TITLES, [_cells(result, side) for result in results for side in result["sides"]]),
    ]
    busy = [result["others_cores"] for result in results if result["disturbed"]]
    if busy:
        lines += ["", f"**Not valid as a comparison**: other programs kept up to {max(busy):.1f} cores busy meanwhile."]
    ratios = [
        (result["benchmark"], _ratio(result, "flax")["ratio"])
        for result in results
        if not result["disturbed"] and not failed(result, "torchvision") and _ratio(result, "flax")
    ]
    goal = f"{DETECTION_TIMES_AS_FAST} times torchvision's best"
    return "\n".join(lines + verdict(goal, ratios, DETECTION_TIMES_AS_FAST))


def _ratio(result: dict[str, Any], side: str) -> dict[str, float] | None:
    theirs, timed = best(result, "torchvision"), rounds(result)
    return times_as_fast(timed[side], timed[theirs]) if theirs and side in timed else None


def _cells(result: dict[str, Any], side: str) -> list[str]:
    told, timed = result["sides"][side], rounds(result)
    if side not in timed:
        return [result["benchmark"], side, f"failed: {told['failure'].replace('|', '/')}", "", "", ""]
    ratio, difference = _ratio(result, side), told["difference"]
    return [
        result["benchmark"],
        side,
        in_words(spread([1000 * seconds for seconds in timed[side]])),
        f"{told['images_per_s']:.1f}",
        in_words(ratio) if ratio else "",
        "reference" if side == result["compared_with"] else "" if difference is None else f"{difference:.1e}",
    ]


if __name__ == "__main__":
    leave(main())
