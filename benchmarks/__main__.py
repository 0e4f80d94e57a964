"""`python -m benchmarks`: the benchmarks one after the other, with tables and JSON, until the time is up."""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from benchmarks.command import pick_device
from convert import command_line
from convert.command_line import Parser, at_least_one, leave
from convert.files import typed_path
from convert.streams import tell_error

_PROGRAM = "python -m benchmarks"
_GRACE = 10.0  # seconds that a benchmark has to end its processes and remove its folders
# where time is short, they end with fewer rounds
_KEEP_WHAT_IS_DONE = ("inference", "training", "detection", "end_to_end")

_EPILOG = """\
On a GPU: training, end to end and inference in bfloat16, each variant at a batch at which all sides fit. On a CPU: Ti
in float32 at batch 8, which is what fits nine minutes on two cores. Other variants and batches, scaling and deploy are
commands of their own. What found no time is named at the end; --only runs it.

exit status: 0 done; 1 a benchmark failed or found no time; 2 wrong flags; 130 Ctrl-C; 143 SIGTERM
"""


@dataclass(frozen=True)
class Entry:
    """A benchmark to be run."""

    flags: list[str]  # its module in `benchmarks` comes first
    share: float  # of all the time, that it may take at most while others wait for what it leaves


def plan(device: str) -> dict[str, Entry]:
    """The benchmarks by the names of their JSON files, most telling first.

    The shares of the first are generous: where a machine is slow, a few tables are better than many without an end.
    """
    if device == "cpu":
        ti = ["--device", "cpu", "--variants", "ti"]
        return {
            "cpu-inference-ti": Entry(["inference", *ti, "--repeats", "9"], 0.5),
            "cpu-training-ti": Entry(["training", *ti, "--repeats", "4"], 0.6),
            "data": Entry(["data", "--repeats", "6"], 0.3),
            "cpu-detection-ti": Entry(["detection", "--repeats", "3"], 0.5),
            "startup": Entry(["startup", "--repeats", "1"], 0.4),
            "cpu-end-to-end-ti": Entry(["end_to_end", *ti, "--augment-on", "host", "--repeats", "2"], 0.5),
        }

    def models(benchmark: str, variant: str, batch_size: int, share: float) -> Entry:
        flags = f"--device gpu --dtype bfloat16 --variants {variant} --batch-size {batch_size}"
        few = "--augment-on device --repeats 3" if benchmark == "end_to_end" else "--repeats 5"
        return Entry([benchmark, *flags.split(), *few.split()], share)

    # Batches for 78 GiB: in training each of the five sides was estimated to need 10 GiB, and all start at once. End to
    # end has those of training, whose compiled programs it finds again.
    return {
        "gpu-training-b": models("training", "b", 96, 0.5),
        "gpu-training-ti": models("training", "ti", 384, 0.3),
        "gpu-end-to-end-ti": models("end_to_end", "ti", 384, 0.4),
        "gpu-inference-b": models("inference", "b", 256, 0.25),
        "gpu-training-s": models("training", "s", 192, 0.3),
        "gpu-inference-ti": models("inference", "ti", 512, 0.25),
        "gpu-end-to-end-b": models("end_to_end", "b", 96, 0.4),
        "gpu-inference-s": models("inference", "s", 512, 0.25),
        "gpu-inference-18-dagger": models("inference", "18-dagger", 256, 0.25),
        "gpu-end-to-end-s": models("end_to_end", "s", 192, 0.4),
        "startup": Entry(["startup", "--repeats", "1"], 0.3),
        "data": Entry(["data", "--repeats", "10"], 0.2),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the plan; returns the exit status, see `--help`."""
    start = time.monotonic()
    parser = Parser(prog=_PROGRAM, description=__doc__.removeprefix(f"`{_PROGRAM}`: "), epilog=_EPILOG)
    parser.add_argument(
        "--output", type=typed_path, metavar="FOLDER", help="for the JSON; default: a new one, benchmarks-DATE-TIME"
    )
    parser.add_argument("--minutes", type=at_least_one, default=9, metavar="N", help="to spend in all; default: 9")
    parser.add_argument("--device", choices=("cpu", "gpu"), help="default: gpu where torch and jax can use one")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these of the plan, by the names of their JSON files")
    args = parser.parse_args(argv)
    return command_line.run(_PROGRAM, lambda: _planned(parser, args, start), failure=1)


def _planned(parser: Parser, args: argparse.Namespace, start: float) -> int:
    entries = plan(pick_device(parser, args))
    if args.only:
        unknown = [name for name in args.only if name not in entries]
        if unknown:
            parser.error(f"--only {unknown[0]}: the plan has {', '.join(entries)}")
        entries = {name: entry for name, entry in entries.items() if name in args.only}
    output = _folder(parser, args.output, entries)
    print(f"{', '.join(entries)}: {args.minutes} minutes for all of them; JSON goes to {output}", flush=True)
    return run(entries, output, start, 60.0 * args.minutes)


def run(entries: Mapping[str, Entry], output: Path, start: float, seconds: float) -> int:
    """Runs the entries until `seconds` after `start`, by time.monotonic(); one that fails does not stop the others."""
    problems, last = [], list(entries)[-1]
    with tempfile.TemporaryDirectory(prefix="crossvit-benchmarks-", ignore_cleanup_errors=True) as folder:
        # Compiled programs are for all entries. What an entry that had to be killed leaves behind goes with the folder.
        environment = {"JAX_COMPILATION_CACHE_DIR": f"{folder}/compiled"} | os.environ | {"TMPDIR": folder}
        for name, entry in entries.items():
            left = start + seconds - time.monotonic()
            if left <= 0:
                problems.append(f"{name} was not run")
                continue
            command = f"python -m benchmarks.{' '.join(entry.flags)}"
            print(f"\n## {name}\n\n`{command}`\n", flush=True)
            module, *flags = entry.flags
            limit = left if name == last else min(left, entry.share * seconds)
            if module in _KEEP_WHAT_IS_DONE:
                flags += ["--seconds", str(max(1, int(limit - _GRACE)))]
            problem = _run(
                [sys.executable, "-m", f"benchmarks.{module}", *flags, "--json", str(output / f"{name}.json")],
                environment,
                limit,
            )
            if problem:
                print(f"{name} {problem}", flush=True)
                problems.append(f"{name} {problem}")
    print(f"\nThe tables again: python -m benchmarks.table {output}/*.json")
    if problems:
        tell_error(f"{_PROGRAM}: error: {'; '.join(problems)}")
    return 1 if problems else 0


def _run(command: Sequence[str], environment: Mapping[str, str], seconds: float) -> str | None:
    """Runs a benchmark for so long at most; returns what went wrong."""
    with subprocess.Popen(command, env=environment, start_new_session=True) as process:
        try:
            status = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"was not finished in {seconds:.0f} s"
        finally:
            _end(process)
    return f"failed with status {status}" if status else None


def _end(process: subprocess.Popen) -> None:
    """Ends what still runs of a benchmark, the processes of its sides included."""
    try:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=_GRACE)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _folder(parser: Parser, asked_for: Path | None, entries: Mapping[str, Entry]) -> Path:
    """Where the JSON goes, made if it is missing. Ends the program rather than replace results."""
    folder = asked_for or Path(f"benchmarks-{datetime.now():%Y%m%d-%H%M%S}")
    try:
        folder.mkdir(exist_ok=True)
        there = [name for name in entries if (folder / f"{name}.json").exists()]
    except OSError as error:
        parser.error(f"--output {folder}: {error.strerror}")
    if there:
        parser.error(f"--output {folder}: has {there[0]}.json already")
    return folder


if __name__ == "__main__":
    leave(main())
