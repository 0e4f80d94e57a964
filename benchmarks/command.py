"""The commands `python -m benchmarks.inference` and `training`; and what all benchmarks share: flags, how they end."""

import argparse
import contextlib
import dataclasses
import importlib.util
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.result import Content, as_json, is_result, write_json
from benchmarks.rounds import Measured, largest_common_batch, measure, say
from benchmarks.table import notes, table_lines
from benchmarks.task import SIDES, Task, default_sides
from convert.command_line import Parser, at_least_one, run
from convert.errors import ConversionError, require
from convert.files import check_replaceable, typed_path
from crossvit_jax.config import get_config
from crossvit_jax.extras import EXTRAS

_EPILOG = """\
Each side runs in a process of its own, one at a time, round by round in turn: A B C A B C … Compilation and warm-up are
not timed. Before anything is timed the sides' results are compared, and must agree.

exit status: 0 done; 1 the sides disagree, or one failed: its row says why, and the table that it is not beside timm at
its best if it was timm's (for a machine without a C compiler: --sides flax timm); 2 wrong flags
"""

# besides those of a worker: what brings them, and the packages
_NEEDED = {
    "the ONNX forms": ("onnx", *EXTRAS["onnx"]),
    "the input pipelines": ("train", "numba", "simplejpeg", "sklearn"),
}


def main(benchmark: str, argv: Sequence[str] | None = None) -> int:
    """Runs a benchmark (inference or training) as the arguments say; returns the exit status."""
    parser = _parser(benchmark)
    args = parser.parse_args(argv)

    def begin() -> int:
        device = pick_device(parser, args)
        args.sides = args.sides or default_sides(device, args.dtype)
        _check(parser, args, device)
        return _run(benchmark, args, device)

    return run(parser.prog, begin, failure=1)


def _parser(benchmark: str) -> Parser:
    parser = Parser(
        prog=f"python -m benchmarks.{benchmark}",
        description=f"Time CrossViT {benchmark}: Flax against timm at its best.",
        epilog=_EPILOG,
    )
    add_model_flags(parser)
    parser.add_argument(
        "--find-largest-batch",
        action="store_true",
        help="double --batch-size until a side runs out of GPU memory, and time the last that fits all",
    )
    parser.add_argument("--sides", nargs="+", choices=SIDES, help="default: those that suit device and dtype")
    add_rounds_flags(parser)
    return parser


def add_rounds_flags(parser: Parser, repeats: int = 10, rounds: str = "rounds of about 1 s") -> None:
    """How many rounds are measured, and where the JSON goes."""
    parser.add_argument(
        "--repeats", type=at_least_one, default=repeats, metavar="N", help=f"{rounds}; default: {repeats}"
    )
    parser.add_argument("--json", type=typed_path, metavar="FILE", help="write what is measured, every round, to FILE")


def add_model_flags(parser: Parser) -> None:
    """Models and where they run; and the time, with which `python -m benchmarks` keeps what was measured until then."""
    parser.add_argument(
        "--variants", "--variant", nargs="+", type=variant_name, default=["ti"], metavar="NAME", help="default: ti"
    )
    parser.add_argument("--batch-size", type=at_least_one, default=8, metavar="N", help="default: 8")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    parser.add_argument("--device", choices=("cpu", "gpu"), help="default: gpu where torch and jax can use one")
    parser.add_argument(
        "--seconds",
        type=at_least_one,
        metavar="N",
        help="begin no round, but the first, that would end after N seconds",
    )


def until(args: argparse.Namespace) -> float | None:
    """When --seconds are over that begin now, by time.monotonic()."""
    return None if args.seconds is None else time.monotonic() + args.seconds


def pick_device(parser: Parser, args: argparse.Namespace) -> str:
    """cpu or gpu: as asked for, or as there is. Ends the program if a GPU is asked for that cannot be used."""
    if args.device == "cpu":
        return "cpu"
    import torch  # takes seconds, which wrong flags need not wait for

    # asking jax itself would take the GPU's memory in this process
    has_gpu = torch.cuda.is_available() and any(
        importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)
    )
    if args.device == "gpu" and not has_gpu:
        parser.error("--device gpu: torch finds no CUDA GPU, or jax is installed without CUDA")
    return "gpu" if has_gpu else "cpu"


def _check(parser: Parser, args: argparse.Namespace, device: str) -> None:
    """Ends the program for flags that do not go together."""
    if args.find_largest_batch and device == "cpu":
        parser.error("--find-largest-batch needs a GPU: a CPU has no memory of its own to run out of")
    if "flax-cudnn" in args.sides and (device, args.dtype) != ("gpu", "bfloat16"):
        parser.error(f"--sides flax-cudnn needs a GPU and --dtype bfloat16; this is {device}, {args.dtype}")
    if len(set(args.sides)) < len(args.sides):
        parser.error("--sides names a side twice")
    writable_json(parser, args.json)


def _run(benchmark: str, args: argparse.Namespace, device: str) -> int:
    end = until(args)
    results: list[Measured] = []
    printed = 0
    with tempfile.TemporaryDirectory(prefix="crossvit-benchmark-") as folder:
        environment = workers_environment(device, Path(folder), one_at_a_time=args.find_largest_batch)
        try:
            for task in model_tasks(benchmark, args, device, Path(folder)):
                say(f"CrossViT {task.variant}, {benchmark}, {args.dtype}, {device}")
                if args.find_largest_batch:
                    batch_size = largest_common_batch(task, args.sides, environment)
                    task = dataclasses.replace(task, batch_size=batch_size)
                measured = measure(
                    task,
                    args.sides,
                    rounds=args.repeats,
                    until=end,
                    keep=not args.find_largest_batch,
                    environment=environment,
                )
                results.append(measured)
                content = as_json(benchmark, results)
                printed = tell(content, table_lines([content]), printed, args.json)
        finally:
            if results:
                print("\n".join(notes([content])), flush=True)
    return 1 if any(times.failure for measured in results for times in measured.sides.values()) else 0


def model_tasks(benchmark: str, args: argparse.Namespace, device: str, folder: Path) -> Iterator[Task]:
    """The task of each of --variants; its weights are written to the folder when it is asked for."""
    from benchmarks.sides.timm import write_weights

    for variant in args.variants:
        weights = folder / f"{variant}.safetensors"
        write_weights(variant, weights)
        yield Task(
            benchmark=benchmark,
            variant=variant,
            batch_size=args.batch_size,
            dtype=args.dtype,
            device=device,
            weights=str(weights),
        )


def tell(content: Content, lines: Sequence[str], printed: int, file: Path | None) -> int:
    """Prints a table from its line `printed` on, and writes the JSON anew; returns how many lines are printed.

    It is called after each variant, so that an interruption costs one.
    """
    print("\n".join(lines[printed:]), flush=True)
    write_json(file, content)
    return len(lines)


def workers_environment(device: str, folder: Path, *, one_at_a_time: bool) -> dict[str, str]:
    """Environment variables for the sides' processes.

    Args:
        device: cpu or gpu.
        folder: for compiled programs: several processes run the same ones.
        one_at_a_time: whether each process has the device for itself.
    """
    compiled = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
    if device == "cpu":
        return {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": compiled}
    variables = {
        "JAX_PLATFORMS": "cuda",
        "JAX_COMPILATION_CACHE_DIR": compiled,
        # Jax takes its memory at once only if it is alone. Beside torch it takes what it needs, but in regions that do
        # not join.
        "XLA_PYTHON_CLIENT_PREALLOCATE": str(one_at_a_time).lower(),
    }
    return variables | ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"} if one_at_a_time else {})


def require_packages(who: str, *more: str) -> None:
    """Raises MissingExtra if a package is missing that one of `_NEEDED` needs, or one of `more`.

    Told before minutes go into sides that have nothing to be compared with.
    """
    extra, *packages = _NEEDED[who]
    require(who, *packages, *more, extra=extra, verb="need")


def writable_json(parser: Parser, file: Path | None) -> None:
    """Ends the program if nothing can be written there, or something else is there: before anything is measured."""
    if file is None:
        return
    try:
        with contextlib.suppress(FileNotFoundError):
            os.lstat(file)  # a name may be too long
        if file.is_dir() or not file.absolute().parent.is_dir():
            parser.error(f"--json {file}: not a file in an existing folder")
        check_replaceable([file], is_result)
        tempfile.TemporaryFile(dir=file.absolute().parent).close()
    except OSError as error:
        parser.error(f"--json {file}: {error.strerror}")
    except ConversionError as error:
        parser.error(f"--json {error}")


def variant_name(text: str) -> str:
    """A flag's value: any name of a variant."""
    try:
        return get_config(text).name
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
