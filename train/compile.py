"""`python -m train.compile --variant b --topology v5e:4x4 --batch-size 4096`: what a step costs, before renting it.

Compiles the training step itself, or the forward pass, for TPUs or GPUs that are not there, or for the devices of this
machine, and says what it takes: memory, arithmetic, communication, and of GPUs the least time for it.
"""

# jax is imported when it is needed: `--help` is instant, and the environment is prepared first.
import argparse
from collections.abc import Sequence
from pathlib import Path

from convert.command_line import Parser, Program, leave, run
from convert.errors import SettingsError
from convert.files import check_place, check_replaceable, home_path
from convert.streams import tell_error
from train.config import TrainConfig
from train.cost.figures import check_case, compile_step, prepare_environment
from train.cost.fit import largest_batches
from train.cost.gpus import GPUS, find_gpu
from train.cost.report import FIT_COLUMNS, as_json, columns, describe, is_report, print_row, write_report
from train.flags import add_settings, apply_flags
from train.images.rand_augment import check_augment_on
from train.recipes import RECIPES

_PROGRAM = Program("train.compile")
_EPILOG = """\
The other flags are those of python -m train.main, so that a command can be tried by changing the name of the module;
here the ones about data, logging, checkpoints and hosts change nothing.

exit status: 0 fits; 1 does not fit; 2 wrong usage

examples:
  python -m train.compile --variant ti s --topology h100 rtx4090 --batch-size 256
  python -m train.compile --variant b --topology v5e:4x4 --batch-size 4096 --mesh data=4,fsdp=4
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, 1 if a step does not fit, or 2 for a mistake in what was asked."""
    early = Parser(prog=_PROGRAM, add_help=False)
    early.add_argument("--recipe", choices=RECIPES, default="imagenet")
    recipe = RECIPES[early.parse_known_args(argv)[0].recipe]
    parser = _parser(recipe)
    given = vars(parser.parse_args(argv))
    num_classes, topologies, file = (given.pop(name) for name in ("num_classes", "topology", "json"))
    inference, fit = given.pop("inference"), given.pop("fit")
    if num_classes < 1:
        parser.error(f"argument --num-classes: must be at least 1; got {num_classes}")
    if fit and (inference or not topologies or not all(map(find_gpu, topologies))):
        parser.error(f"argument --fit: tells the batches of training steps on GPUs: --topology {' '.join(GPUS)}")
    variants = given.pop("variant", None) or ([None] if "branches" in given else ["ti"])

    def compile_all() -> int:
        configs = [apply_flags(recipe, given | {"variant": variant}) for variant in variants]
        for config in configs:
            if config.task != "classification":
                raise SettingsError(f"only programs of classification are compiled, not those of {config.task}")
            config.model_config(num_classes)
            check_augment_on(config)
        if file is not None:
            check_place(file, overwrite=True)
            check_replaceable([file], is_report)
        prepare_environment(topologies or ())
        if fit:
            return _report_fit(configs, topologies, num_classes, file)
        cases = [(config, topology) for topology in topologies or [None] for config in configs]
        for config, topology in cases:
            check_case(config, num_classes, topology)
        return _report(cases, num_classes, inference, file)

    return run(_PROGRAM, compile_all)


def _parser(recipe: TrainConfig) -> Parser:
    parser = Parser(
        prog=_PROGRAM,
        description="Compile the training step for TPUs or GPUs that are not there (--topology) or for the devices of\n"
        "this machine, and print its memory, arithmetic and communication. With several variants or topologies: as a\n"
        "table. Nothing is run.",
        epilog=_EPILOG,
        conflict_handler="resolve",  # --variant, which train.main has once
    )
    add_settings(parser, recipe)
    parser.add_argument(
        "--variant",
        nargs="+",
        default=argparse.SUPPRESS,
        metavar="VARIANT",
        help="CrossViT variants, by their short names, timm's or IBM's (default: ti)",
    )
    parser.add_argument(
        "--topology",
        nargs="+",
        metavar="TOPOLOGY",
        help="slices of TPUs such as v5e:4x4, v5p:4x4x4, v6e:8x8, which need libtpu; or one GPU or several, such as "
        f"h100 or h100:8 ({', '.join(GPUS)}), which need the extra gpu-compile; no device is needed (default: those "
        "here)",
    )
    parser.add_argument(
        "--inference",
        action="store_true",
        help="the forward pass in place of the training step, images as uint8, parameters in the arithmetic's dtype",
    )
    parser.add_argument(
        "--fit",
        action="store_true",
        help="the largest batch that fits each card of --topology, with and without --grad-checkpointing and "
        "--grad-accum: for each of these four, three programs or more of the first card, and one of each other",
    )
    parser.add_argument("--json", type=_path, metavar="FILE", help="write all that is known to FILE")
    parser.add_argument("--num-classes", type=int, default=1000, metavar="N", help="classes (default: 1000)")
    return parser


def _path(text: str) -> Path:
    return Path(home_path(text))


def _report(cases: list[tuple[TrainConfig, str | None]], num_classes: int, inference: bool, file: Path | None) -> int:
    places = {None if topology is None else find_gpu(topology) is not None for _, topology in cases}
    shown = columns(on_gpus=True in places, on_tpus=False in places)
    refused, results = [], []
    for number, (config, topology) in enumerate(cases):
        name, place = config.model_config(num_classes).name, topology or "the devices here"
        tell_error(f"compiling {name} for {place}, batch {config.batch_size} …")
        figures = compile_step(config, num_classes, topology, inference=inference)
        if figures.too_much is not None:
            refused.append(f"{figures.config.variant} on {figures.slice} does not fit: {figures.too_much}")
        if len(cases) == 1:
            print(describe(figures, num_classes))
        else:
            print_row(shown, figures, head=number == 0)
        results.append(as_json(figures))
        write_report(file, results)
    if len(cases) > 1 and refused:
        print("", *refused, sep="\n")
    return 1 if refused else 0


def _report_fit(configs: list[TrainConfig], topologies: list[str], num_classes: int, file: Path | None) -> int:
    results = []
    tell_error(f"compiling some {4 * (2 + len(topologies)) * len(configs)} programs, each for a minute or more …")
    for config in configs:
        for fit in largest_batches(config, num_classes, topologies, tell_error):
            print_row(FIT_COLUMNS, fit, head=not results)
            results.append(as_json(fit))
            write_report(file, results)
    return 0 if all(result["batches"]["none"] for result in results) else 1


if __name__ == "__main__":
    leave(main())
