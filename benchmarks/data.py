"""The command `python -m benchmarks.data`: encoded photographs to training batches, ours against timm's transform.

A process of each side makes batches on one core, in turn with the others: `timm`; `host`, our workers where they
augment; `device-worker`, our workers where the device augments; and `device-augment`, what the device then does, which
runs beside the workers and is no rival of theirs. Nothing is timed before pixels made from the same draws are equal.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.command import add_rounds_flags, require_packages, writable_json
from benchmarks.report.goals import DATA_TIMES_AS_FAST, verdict
from benchmarks.result import (
    Content,
    about,
    images_per_s,
    in_words,
    markdown_table,
    times_as_fast,
    told_facts,
    where,
    write_json,
)
from benchmarks.rounds import ACCEPTED_OTHERS, SidesDisagree, Times, cores_of_others, take_turns
from benchmarks.task import DATA_SIDES, SIDES_ON_A_CORE, DataTask
from benchmarks.worker import SideFailed
from convert.command_line import Parser, at_least_one, leave, run


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status: 0 done; 1 the sides disagree or one failed; 2 wrong flags, or a
    package is missing.
    """
    parser = Parser(prog="python -m benchmarks.data", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--photographs", type=at_least_one, default=48, metavar="N", help="images in a batch; default: 48"
    )
    add_rounds_flags(parser)
    args = parser.parse_args(argv)
    writable_json(parser, args.json)
    return run(parser.prog, lambda: _run(DataTask(photographs=args.photographs), args), failure=1)


def _run(task: DataTask, args: argparse.Namespace) -> int:
    require_packages("the input pipelines")
    sides = _measure(task, args.repeats)
    content = as_json(task, sides)
    print(as_markdown(content))
    write_json(args.json, content)
    return 0


def _measure(task: DataTask, rounds: int) -> dict[str, Times]:
    """Every side in turn, see `take_turns`. Raises SidesDisagree, and SideFailed if one fails: the table needs all."""
    sides = {side: Times() for side in DATA_SIDES}

    def compare_all() -> None:
        _require(sides)
        compare({side: times.ready.check for side, times in sides.items()})

    take_turns(task, sides, compare=compare_all, rounds=rounds, environment={})
    _require(sides)
    return sides


def _require(sides: Mapping[str, Times]) -> None:
    """Raises SideFailed if one of them failed."""
    for side, times in sides.items():
        if times.failure is not None:
            raise SideFailed(f"{side}: {times.failure}")


def compare(checks: dict[str, dict[str, np.ndarray]]) -> None:
    """Raises SidesDisagree if two sides have other pixels under the same name."""
    for side, check in checks.items():
        for name, pixels in check.items():
            if not np.array_equal(pixels, checks["timm"][name]):
                raise SidesDisagree(f"the {name} of {side} are not those of timm: nothing is timed")


def as_json(task: DataTask, sides: dict[str, Times]) -> dict[str, Any]:
    """Everything measured, with every round, in plain types."""
    return about("data", told_facts(sides.values())) | {
        "photographs": task.photographs,
        "others_cores": cores_of_others(sides),
        "sides": {
            side: {
                "images_per_s": images_per_s(times.seconds, task.photographs),
                "times_as_fast_as_timm": times_as_fast(times.seconds, sides["timm"].seconds)
                if side in SIDES_ON_A_CORE
                else None,
                "rounds_images_per_s": [task.photographs / seconds for seconds in times.seconds],
                "calls_per_round": times.ready.calls,
                "load_s": times.ready.load_s,
                "first_result_s": times.ready.first_s,
            }
            for side, times in sides.items()
        },
    }


def as_markdown(content: Content) -> str:
    """A line on the machine and a table with a row per side, from what `as_json` gives."""
    ratios = {side: told["times_as_fast_as_timm"] for side, told in content["sides"].items()}
    rows = [
        [side, in_words(told["images_per_s"], ".0f"), in_words(ratios[side]) if ratios[side] else "beside the workers"]
        for side, told in content["sides"].items()
    ]
    lines = [
        f"{content['photographs']} JPEG photographs of 500 x 375 to a training batch at 240 pixels; {where(content)}",
        "",
        *markdown_table(["side", "images/s, median (min-max)", "times as fast as timm (min-max)"], rows),
    ]
    busy = content["others_cores"]
    # each side needs a core for itself
    if busy is not None and busy > content["machine"]["cores"] - 1 + ACCEPTED_OTHERS:
        lines += ["", f"**Not valid as a comparison**: other programs kept {busy:.1f} cores busy meanwhile."]
    else:
        ours = [(side, ratios[side]["ratio"]) for side in SIDES_ON_A_CORE if side != "timm"]
        lines += verdict(f"{DATA_TIMES_AS_FAST} times timm on a core", ours, DATA_TIMES_AS_FAST)
    return "\n".join(lines)


if __name__ == "__main__":
    leave(main())
