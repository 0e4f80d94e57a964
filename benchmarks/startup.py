"""`python -m benchmarks.startup`: from `python -m train.main` to the end of its first step, first and second start."""

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

from benchmarks.command import variant_name, writable_json
from benchmarks.result import Content, about, in_words, markdown_table, spread, times_as_fast, where, write_json
from benchmarks.rounds import say
from benchmarks.worker import SideFailed
from convert.command_line import Parser, at_least_one, at_least_zero, leave, run
from convert.errors import SettingsError
from convert.files import typed_path
from train.recipes import RECIPES

GOAL = 1 / 3  # share of the first start that a second one may take

_FIRST_STEP = "the first step was done"


def main(argv: Sequence[str] | None = None) -> int:
    """Starts training with an empty cache of compiled programs and again, and prints how long each took to a step.

    Returns the exit status: 0 done; 1 training ended before its first step; 2 wrong flags.
    """
    parser = Parser(
        prog="python -m benchmarks.startup",
        description="Time the start of training on the digits, without and with the cache of compiled programs.",
    )
    parser.add_argument("--variant", type=variant_name, default="ti", metavar="NAME", help="default: ti")
    parser.add_argument("--image-size", type=at_least_one, default=240, metavar="PIXELS", help="default: 240")
    parser.add_argument("--batch-size", type=at_least_one, default=8, metavar="N", help="default: 8")
    parser.add_argument(
        "--workers", type=at_least_zero, default=0, metavar="N", help="processes that read; default: 0, the digits' own"
    )
    parser.add_argument("--recipe", choices=RECIPES, default="digits", help="default: digits, with little augmentation")
    parser.add_argument("--augment-on", choices=("host", "device"), help="default: where train.main does by itself")
    parser.add_argument(
        "--repeats", type=at_least_one, default=3, metavar="N", help="pairs of a first and a second start; default: 3"
    )
    parser.add_argument("--json", type=typed_path, metavar="FILE", help="write what was measured to FILE")
    args = parser.parse_args(argv)
    try:
        dataclasses.replace(RECIPES[args.recipe], variant=args.variant, image_size=args.image_size).model_config(10)
    except SettingsError as error:
        parser.error(str(error))
    writable_json(parser, args.json)
    return run(parser.prog, lambda: _run(args), failure=1)


def _run(args: argparse.Namespace) -> int:
    flags = ["--variant", args.variant, "--image-size", str(args.image_size), "--batch-size", str(args.batch_size)]
    flags += ["--workers", str(args.workers), "--dataset", "digits", "--recipe", args.recipe]
    if args.augment_on:
        flags += ["--augment-on", args.augment_on]
    starts: dict[str, list[float]] = {"first_start_s": [], "second_start_s": []}
    with tempfile.TemporaryDirectory(prefix="crossvit-startup-") as folder:
        uncached = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
        _seconds(flags, f"{folder}/warm-up", uncached)  # the packages' files come into memory
        for number in range(1, args.repeats + 1):
            cached = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/compiled-{number}"}
            for start, seconds in starts.items():
                seconds.append(_seconds(flags, f"{folder}/{number}-{start}", cached))
            say(f"pair {number} of {args.repeats} done")
    content = about("startup") | {"flags": flags} | starts
    print(as_markdown(content))
    write_json(args.json, content)
    return 0


def as_markdown(content: Content) -> str:
    """A line on what was started where, a table, and whether the goal is reached."""
    # files older than --repeats have one number each
    first, second = (
        told if isinstance(told, list) else [told] for told in (content["first_start_s"], content["second_start_s"])
    )
    share = times_as_fast(first, second)  # seconds of the second start for one of the first
    rows = [
        ["first", in_words(spread(first), ".1f"), "1"],
        ["second", in_words(spread(second), ".1f"), in_words(share)],
    ]
    return "\n".join(
        [
            f"`python -m train.main {' '.join(content['flags'])}`, to the end of the first step; {where(content)}",
            "",
            *markdown_table(["start", "seconds, median (min-max)", "share of the first (min-max)"], rows),
            "",
            f"The goal, at most {GOAL:.2f} of the first start, is {'reached' if share['ratio'] <= GOAL else 'missed'}.",
        ]
    )


def _seconds(flags: list[str], output: str, environment: Mapping[str, str]) -> float:
    """From the start of the process until it says that its first step is done. Raises SideFailed if it never does."""
    start = time.perf_counter()
    command = [sys.executable, "-u", "-m", "train.main", *flags, "--output", output]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            last = ""
            for line in process.stdout:
                if _FIRST_STEP in line:
                    return time.perf_counter() - start
                last = line.strip() or last
        finally:
            process.kill()  # it would train on, also when this process was told to end
    raise SideFailed(f"train.main ended before its first step: {last}")


if __name__ == "__main__":
    leave(main())
