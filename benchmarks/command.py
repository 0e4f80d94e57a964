"""What the commands of this package share: flags, what is checked before anything is measured, and how they end."""

import argparse
import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from benchmarks.result import Content, as_json, failed, is_result
from benchmarks.rounds import measure, say
from benchmarks.table import tables
from benchmarks.task import ModelTask, Task
from convert.command_line import Parser, at_least_one, data_set, run
from convert.errors import SettingsError
from convert.files import check_place, check_replaceable, home_path, typed_path, write_whole
from crossvit_jax.config import VARIANTS

EPILOG = """\
Each side runs in a process of its own, one at a time, round by round in turn: A B C A B C … Compilation and warm-up are
not timed. Before anything is timed the sides' results are compared, and must agree.

exit status: 0 done; 1 the sides disagree, or one failed: its row says why; 2 wrong flags, or a package is missing
"""


def parser_of(benchmark: str, description: str, epilog: str = EPILOG) -> Parser:
    """The parser of a module's command."""
    return Parser(prog=f"python -m benchmarks.{benchmark}", description=description, epilog=epilog)


def add_rounds(parser: Parser, sides: Iterable[str] = (), repeats: int = 10, what: str = "rounds") -> None:
    """Which sides there are to choose from, how many rounds are measured, and where the JSON goes."""
    if sides:
        parser.add_argument("--sides", nargs="+", choices=tuple(sides), help="default: all")
    help = f"{what}; default: {repeats}"
    parser.add_argument("--repeats", type=at_least_one, default=repeats, metavar="N", help=help)
    parser.add_argument("--json", type=typed_path, metavar="FILE", help="write what is measured, every round, to FILE")


def add_data(parser: Parser) -> None:
    """Whose held-out images are tried, unless they are those of a run."""
    add = parser.add_argument
    add("--dataset", type=data_set, metavar="DATA", help="as of python -m train.main; default: that of a run")
    add("--data-dir", type=home_path, metavar="DIR", help="where prepared data sets lie; default: likewise")


def given_data(args: argparse.Namespace) -> dict[str, str]:
    """Those of the flags of `add_data` that were given."""
    return {name: value for name in ("dataset", "data_dir") if (value := getattr(args, name)) is not None}


def add_variants(parser: Parser, batch: int = 8) -> None:
    """Models and their batches."""
    parser.add_argument("--variants", "--variant", nargs="+", choices=VARIANTS, default=["ti"], help="default: ti")
    parser.add_argument("--batch-size", type=at_least_one, default=batch, metavar="N", help=f"default: {batch}")


def add_models(parser: Parser) -> None:
    """Models and where they run."""
    add_variants(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    parser.add_argument("--device", choices=("cpu", "gpu"), help="default: gpu where torch and jax can use one")


def models(args: argparse.Namespace, device: str, folder: Path, make: Callable[..., ModelTask]) -> Iterator[ModelTask]:
    """A task for each of --variants; its weights are written to the folder when it is asked for."""
    for variant in args.variants:
        settings = {"dtype": getattr(args, "dtype", "float32"), "batch_size": args.batch_size, "device": device}
        task = make(variant=variant, weights=str(folder / f"{variant}.safetensors"), **settings)
        task.write_weights()
        yield task


def pick_device(args: argparse.Namespace) -> str:
    """cpu or gpu: as asked for, or as there is. Raises SettingsError for a GPU that cannot be used."""
    if args.device == "cpu":
        return "cpu"
    import torch  # takes seconds, which wrong flags need not wait for

    # asking jax itself would take the GPU's memory in this process
    plugins = [importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)]
    has_gpu = torch.cuda.is_available() and any(plugins)
    if args.device == "gpu" and not has_gpu:
        raise SettingsError("--device gpu: torch finds no CUDA GPU, or jax is installed without CUDA")
    return "gpu" if has_gpu else "cpu"


def run_benchmark(parser: Parser, args: argparse.Namespace, measured: Callable[[], Iterable[Content]]) -> int:
    """Runs what yields the JSON content, as far as it is known each time; returns the exit status: 1 if a side failed.

    The content is written each time, so that an interruption costs little, and its tables are printed at the end.
    """

    def begin() -> int:
        if args.json:
            check_place(args.json, overwrite=True)
            check_replaceable([args.json], is_result)
        content = {"results": []}
        try:
            for content in measured():
                if args.json:
                    write_whole(args.json, f"{json.dumps(content, indent=2)}\n".encode())
        finally:
            if content["results"]:
                print("\n\n".join(tables([content])), flush=True)
        return 1 if any(map(failed, content["results"])) else 0

    return run(parser.prog, begin, failure=1)


def run_sides(parser: Parser, args: argparse.Namespace, tasks: Callable[[str, Path], Iterable[Task]]) -> int:
    """Measures the sides of tasks, see `run_benchmark`.

    The tasks are made for a device, with what they need in a folder, one at a time.
    """

    def contents() -> Iterator[Content]:
        device, measured = pick_device(args) if hasattr(args, "device") else "cpu", []
        with tempfile.TemporaryDirectory(prefix="crossvit-benchmark-") as folder:
            environment = workers_environment(device, Path(folder))
            for task in tasks(device, Path(folder)):
                say(", ".join(f"{name} {value}" for name, value in task.told().items()))
                sides = list(dict.fromkeys(args.sides or task.SIDES))
                measured.append(measure(task, sides, rounds=args.repeats, environment=environment))
                yield as_json(parser.prog.rpartition(".")[2], measured)

    return run_benchmark(parser, args, contents)


def workers_environment(device: str, folder: Path) -> dict[str, str]:
    """Environment variables for the sides' processes, several of which run the programs that one compiled."""
    compiled = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
    variables = {"JAX_PLATFORMS": "cuda" if device == "gpu" else "cpu", "JAX_COMPILATION_CACHE_DIR": compiled}
    # beside torch, jax takes what it needs, not nearly all memory at once
    return variables | ({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if device == "gpu" else {})
