"""`python -m benchmarks`: the benchmarks one after the other, with tables and JSON, until the time is up."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.command import pick_device
from convert.command_line import Parser, at_least_one

_MODELS_ON_GPU = ["--dtype", "bfloat16", "--batch-size", "256", "--repeats", "5"]


def plan(device: str) -> dict[str, list[str]]:
    """The benchmarks by the names of their JSON files, most telling first: a module of `benchmarks` and its flags."""
    if device == "cpu":
        return {
            "cpu-inference": ["inference", "--device", "cpu", "--variants", "ti", "s", "--repeats", "6"],
            "cpu-training": ["training", "--device", "cpu", "--variants", "ti", "--repeats", "4"],
            "data": ["data", "--repeats", "10"],
            "startup": ["startup"],
        }
    model = {"inference": ["ti", "s", "b", "18-dagger"], "training": ["ti", "s", "b"]}
    runs = {
        f"gpu-{benchmark}-{attention}": [
            *(benchmark, "--device", "gpu", "--attention", attention, "--variants", *variants, *_MODELS_ON_GPU)
        ]
        for attention in ("xla", "cudnn")
        for benchmark, variants in model.items()
    }
    return runs | {"data": ["data", "--repeats", "10"], "startup": ["startup"]}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the plan. Returns the exit status: 0 done; 1 a benchmark failed or the time was up; 2 wrong flags."""
    parser = Parser(prog="python -m benchmarks", description=__doc__.split("`: ")[1])
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results"), metavar="FOLDER", help="for the JSON"
    )
    parser.add_argument("--minutes", type=at_least_one, default=10, metavar="N", help="to spend in all; default: 10")
    parser.add_argument("--device", choices=("cpu", "gpu"), help="default: gpu where torch and jax can use one")
    args = parser.parse_args(argv)
    if not args.output.is_dir():
        parser.error(f"--output {args.output}: no such folder")
    return run(plan(pick_device(parser, args)), args.output, time.monotonic() + 60 * args.minutes)


def run(commands: dict[str, list[str]], output: Path, end: float) -> int:
    """Runs them until `end`, by time.monotonic(). One that fails does not keep the others from being run."""
    problems = []
    for name, (module, *flags) in commands.items():
        command = [sys.executable, "-m", f"benchmarks.{module}", *flags, "--json", str(output / f"{name}.json")]
        left = end - time.monotonic()
        if left <= 0:
            problems.append(f"{name} was not run")
            continue
        print(f"\n## {name}\n\n`python -m benchmarks.{' '.join([module, *flags])}`\n", flush=True)
        with subprocess.Popen(command, start_new_session=True) as process:
            try:
                if process.wait(timeout=left):
                    problems.append(f"{name} failed with status {process.returncode}")
            except subprocess.TimeoutExpired:
                problems.append(f"{name} was not finished")
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # with the processes of the sides
    if problems:
        print(f"python -m benchmarks: error: {'; '.join(problems)}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
