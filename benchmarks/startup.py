"""`python -m benchmarks.startup`: from `python -m train.main` to the end of its first step, first and second start."""

import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence

from benchmarks.command import add_rounds, parser_of, run_benchmark
from benchmarks.result import Content, one_result
from benchmarks.rounds import say
from benchmarks.worker import SideFailed
from convert.command_line import leave
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
    add_rounds(parser, repeats=3, what="pairs of a first and a second start")
    args, flags = parser.parse_known_args(argv)
    return run_benchmark(parser, args, lambda: _measured(args.repeats, [*shlex.split(_FLAGS), *flags]))


def _measured(repeats: int, flags: list[str]) -> Iterator[Content]:
    parse_flags(flags).model_config(10)
    starts: dict[str, list[float]] = {"first": [], "second": []}
    with tempfile.TemporaryDirectory(prefix="crossvit-startup-") as folder:
        uncached = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
        _seconds(flags, f"{folder}/warm-up", uncached)  # the packages' files come into memory
        for number in range(1, repeats + 1):
            cached = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/compiled-{number}"}
            for start, seconds in starts.items():
                seconds.append(_seconds(flags, f"{folder}/{number}-{start}", cached))
            say(f"pair {number} of {repeats} done")
    sides = {start: {"seconds": seconds} for start, seconds in starts.items()}
    yield one_result("startup", {"flags": shlex.join(flags)}, sides)


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
