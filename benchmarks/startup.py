"""`python -m benchmarks.startup`: from `python -m train.main` to the end of its first step, first and second start."""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.command import exit_status, variant_name, writable_json
from benchmarks.report import machine, write_json
from benchmarks.worker import SideFailed
from convert.command_line import Parser, at_least_one

_FIRST_STEP = "the first step was done"


def main() -> int:
    """Starts training twice with an empty cache of compiled programs, and prints how long each took to its first step.

    Returns the exit status: 1 if training does not get to its first step.
    """
    parser = Parser(
        prog="python -m benchmarks.startup",
        description="Time the start of training on the digits, without and with the cache of compiled programs.",
    )
    parser.add_argument("--variant", type=variant_name, default="ti", metavar="NAME", help="default: ti")
    parser.add_argument("--image-size", type=at_least_one, default=240, metavar="PIXELS", help="default: 240")
    parser.add_argument("--batch-size", type=at_least_one, default=8, metavar="N", help="default: 8")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured to FILE")
    args = parser.parse_args()
    writable_json(parser, args.json)
    return exit_status(parser, lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    flags = ["--variant", args.variant, "--image-size", str(args.image_size), "--batch-size", str(args.batch_size)]
    with tempfile.TemporaryDirectory(prefix="crossvit-startup-") as folder:
        uncached = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
        _seconds(flags, f"{folder}/warm-up", uncached)  # the packages' files come into memory
        cached = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/compiled"}
        first, second = (_seconds(flags, f"{folder}/run-{turn}", cached) for turn in (1, 2))
    measured = {"flags": flags, "first_start_s": first, "second_start_s": second, "share": second / first}
    print(f"`python -m train.main {' '.join(flags)}`, to the end of the first step:\n")
    print("| start | seconds | share of the first |\n| --- | --- | --- |")
    print(f"| first | {first:.1f} | 1 |\n| second | {second:.1f} | {second / first:.2f} |")
    if args.json:
        write_json(args.json, {"benchmark": "startup", "machine": machine()} | measured)
    return 0


def _seconds(flags: list[str], output: str, environment: dict[str, str]) -> float:
    """From the start of the process until it says that its first step is done. Raises SideFailed if it never does."""
    start = time.perf_counter()
    command = [sys.executable, "-u", "-m", "train.main", *flags, "--output", output]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        last = ""
        for line in process.stdout:
            if _FIRST_STEP in line:
                seconds = time.perf_counter() - start
                process.kill()
                return seconds
            last = line.strip() or last
    raise SideFailed(f"train.main ended before its first step: {last}")


if __name__ == "__main__":
    sys.exit(main())
