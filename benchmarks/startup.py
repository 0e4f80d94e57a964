"""`python -m benchmarks.startup`: from `python -m train.main` to the end of its first step, first and second start."""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

from benchmarks.command import add_json, check_json, parser_of, tell
from benchmarks.result import about, timed, write_json
from benchmarks.rounds import say
from benchmarks.worker import SideFailed
from convert.command_line import at_least_one, leave, run
from train.flags import parse_flags

_FIRST_STEP = "the first step was done"
_FLAGS = "--variant ti --image-size 240 --batch-size 8 --workers 0 --dataset digits --recipe digits"
_EPILOG = f"""\
Other flags are those of python -m train.main, which has these unless told otherwise: {_FLAGS}.

exit status: 0 done; 1 training ended before its first step; 2 wrong flags
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Starts training with an empty cache of compiled programs and again, and prints how long each took to a step."""
    description = "Time the start of training on the digits, without and with the cache of compiled programs."
    parser = parser_of("startup", description, _EPILOG)
    repeats = "pairs of a first and a second start; default: 3"
    parser.add_argument("--repeats", type=at_least_one, default=3, metavar="N", help=repeats)
    add_json(parser)
    args, flags = parser.parse_known_args(argv)
    return run(parser.prog, lambda: _run(args, [*shlex.split(_FLAGS), *flags]), failure=1)


def _run(args: argparse.Namespace, flags: list[str]) -> int:
    check_json(args.json)
    parse_flags(flags).model_config(10)
    starts: dict[str, list[float]] = {"first": [], "second": []}
    with tempfile.TemporaryDirectory(prefix="crossvit-startup-") as folder:
        uncached = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
        _seconds(flags, f"{folder}/warm-up", uncached)  # the packages' files come into memory
        for number in range(1, args.repeats + 1):
            cached = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/compiled-{number}"}
            for start, seconds in starts.items():
                seconds.append(_seconds(flags, f"{folder}/{number}-{start}", cached))
            say(f"pair {number} of {args.repeats} done")
    sides = {start: timed(seconds) for start, seconds in starts.items()}
    content = about("startup") | {"results": [{"flags": shlex.join(flags), "disturbed": False, "sides": sides}]}
    write_json(args.json, content)
    return tell(content)


def _seconds(flags: list[str], output: str, environment: Mapping[str, str]) -> float:
    """From the start of the process until it says that its first step is done. Raises SideFailed if it never does."""
    start = time.perf_counter()
    command = [sys.executable, "-u", "-m", "train.main", *flags, "--output", output]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=environment, **streams) as process:
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
