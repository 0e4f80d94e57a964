"""`python -m train.compile --variant b --topology v5e:4x4 --batch-size 4096`: what a step costs, before renting it.

Compiles the training step itself for a slice of TPUs that is not there, or for the devices of this machine, and says
what it takes: memory, arithmetic, communication.
"""

# jax is imported when it is needed: `--help` is instant, and the environment is prepared first.
import argparse
from collections.abc import Sequence

from convert.command_line import Parser, leave, run
from train.config import TrainConfig
from train.cost.figures import Figures, compile_step
from train.flags import add_settings, apply_flags
from train.images.rand_augment import check_augment_on
from train.recipes import RECIPES

_PROGRAM = "python -m train.compile"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, 1 if a step does not fit, or 2 for a mistake in what was asked."""
    early = Parser(prog=_PROGRAM, add_help=False)
    early.add_argument("--recipe", choices=RECIPES, default="imagenet")
    recipe = RECIPES[early.parse_known_args(argv)[0].recipe]
    parser = _parser(recipe)
    given = vars(parser.parse_args(argv))
    num_classes, topologies = given.pop("num_classes"), given.pop("topology")
    if num_classes < 1:
        parser.error(f"argument --num-classes: must be at least 1; got {num_classes}")
    variants = given.pop("variant", None) or ([None] if "branches" in given else ["ti"])

    def compile_all() -> int:
        configs = [apply_flags(recipe, given | {"variant": variant}) for variant in variants]
        for config in configs:
            config.model_config(num_classes)
            check_augment_on(config)
        cases = [(config, topology) for topology in topologies or [None] for config in configs]
        return _report(cases, num_classes)

    return run(_PROGRAM, compile_all)


def _parser(recipe: TrainConfig) -> Parser:
    parser = Parser(
        prog=_PROGRAM,
        description="Compile the training step for TPUs that are not there (--topology) or for the devices of this "
        "machine, and print its memory, arithmetic and communication. With several variants or topologies: as a table.",
        epilog="The other flags are those of python -m train.main, so that a command can be tried by changing the "
        "name of the module; here the ones about data, logging, checkpoints and hosts change nothing. Exit status: "
        "0 fits, 1 does not fit, 2 wrong usage.",
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
        metavar="SLICE",
        help="slices of TPUs such as v5e:4x4, v5p:4x4x4, v6e:8x8: needs libtpu, but no TPU (default: the devices here)",
    )
    parser.add_argument("--num-classes", type=int, default=1000, metavar="N", help="classes (default: 1000)")
    return parser


def _report(cases: list[tuple[TrainConfig, str | None]], num_classes: int) -> int:
    if cases[0][1] is not None:
        from train.cost.slices import prepare_environment

        prepare_environment()
    refused = []
    for number, (config, topology) in enumerate(cases):
        figures = compile_step(config, num_classes, topology)
        if figures.too_much is not None:
            refused.append(f"{figures.config.variant} on {figures.slice} does not fit: {figures.too_much}")
        if len(cases) == 1:
            print(describe(figures, num_classes))
        else:
            print(table_row(figures) if number else f"{TABLE_HEAD}\n{table_row(figures)}", flush=True)
    if len(cases) > 1 and refused:
        print("", *refused, sep="\n")
    return 1 if refused else 0


def describe(figures: Figures, num_classes: int) -> str:
    """A few lines for the user."""
    from train.devices.memory import format_bytes

    config = figures.config
    lines = [
        f"CrossViT {config.variant}, {num_classes} classes, {config.precision}, batch {config.batch_size} on "
        f"{figures.devices} x {figures.device_kind} ({figures.slice}), mesh {figures.mesh}"
    ]
    if figures.memory is not None:
        lines.append(figures.memory.describe(figures.available))
    by_xla = "" if figures.compiler_flops is None else f"; {_count(figures.compiler_flops)} by XLA's own count"
    lines.append(f"FLOPs per step: {_count(figures.flops)} in matrix products and convolutions{by_xla}")
    if figures.cycles is not None:
        lines.append(f"clock cycles per step by the compiler's own estimate: {_count(figures.cycles)}")
    if figures.traffic is not None:
        kinds = [f"{kind} {format_bytes(t.volume)} in {t.calls}" for kind, t in figures.traffic.items()]
        sent = format_bytes(sum(t.sent for t in figures.traffic.values()))
        told = f"{', '.join(kinds)}; {sent} sent on rings" if kinds else "none"
        lines.append(f"communication per step and device: {told}")
    lines.append(f"compiled in {figures.seconds:.0f} s")
    lines.append(f"does not fit: {figures.too_much}" if figures.too_much else "fits")
    return "\n".join(lines)


TABLE_HEAD = """\
| variant | slice | devices | memory per device | available | FLOPs per step | all-reduce | other collectives | sent | \
compiled in | fits |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


def table_row(figures: Figures) -> str:
    """The figures as a row under `TABLE_HEAD`."""
    from train.devices.memory import format_bytes

    needed, traffic = figures.needed, figures.traffic
    reduced = others = sent = "-"
    if traffic is not None:
        reduced = format_bytes(sum(t.volume for kind, t in traffic.items() if kind == "all-reduce"))
        others = format_bytes(sum(t.volume for kind, t in traffic.items() if kind != "all-reduce"))
        sent = format_bytes(sum(t.sent for t in traffic.values()))
    cells = [
        figures.config.variant,
        figures.slice,
        f"{figures.devices} x {figures.device_kind}",
        "unknown" if needed is None else format_bytes(needed),
        "unknown" if figures.available is None else format_bytes(figures.available),
        _count(figures.flops),
        reduced,
        others,
        sent,
        f"{figures.seconds:.0f} s",
        "no" if figures.too_much else "yes",
    ]
    return f"| {' | '.join(cells)} |"


def _count(number: float) -> str:
    """A large number in words: `38.3 T`."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


if __name__ == "__main__":
    leave(main())
