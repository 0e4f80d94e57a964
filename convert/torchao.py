"""The command `python -m convert.torchao SOURCE model.pt`."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from convert.command_line import Parser, run, tell_result

if TYPE_CHECKING:
    from convert.weights import Weights

_EPILOG = """\
SOURCE    what python -m convert takes, say the folder of a run with --qat
model.pt  the PyTorch twin, its linear layers in integers, for convert.torchao_model.load_torchao; the file is only kept
          if it computes what SOURCE does

exit status: 0 done; 1 the file was not kept; 2 nothing was written, and one line on stderr says why
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Quantises as the arguments say; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    return run(parser.prog, lambda: _quantise(args))


def _parser() -> Parser:
    parser = Parser(
        prog="python -m convert.torchao",
        description="Quantise the PyTorch twin by torchao: the layers of --qat, with its numbers of bits.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("destination", metavar="model.pt")
    parser.add_argument("--quantize", choices=("int8", "int4"), default="int8", help="weights in; default: int8")
    parser.add_argument(
        "--compare", metavar="digits|FOLDER", help="images to compare with SOURCE on; default: photographs"
    )
    parser.add_argument("--dtype", choices=("float32",), help="take weights that are stored in half precision")
    parser.add_argument("--overwrite", action="store_true", help="replace model.pt if it exists")
    return parser


def _quantise(args: argparse.Namespace) -> int:
    # imported late: --help and a mistyped command line need not wait for the frameworks
    from convert.models import load_weights
    from convert.quantized_export import check_weights
    from convert.tensors import DTYPES
    from convert.torchao_model import check_torchao, export_torchao

    options = {"compare": args.compare, "overwrite": args.overwrite}
    check_torchao(args.destination, **options)
    weights = load_weights(args.source)
    stored = weights.dtypes
    if args.dtype:
        weights = weights.astype(DTYPES[args.dtype])
    check_weights(weights)
    _report(weights, stored)
    path, difference = export_torchao(weights, args.destination, args.quantize, **options)
    return tell_result(path, difference, kept=difference.passed)


def _report(weights: "Weights", stored: list[str]) -> None:
    config = weights.config
    height, width = config.image_size
    print(f"variant     {config.name}, {height} x {width} pixels, classes: {config.num_classes or 'none: no head'}")
    parameters = sum(array.size for array in weights.tensors.values())
    print(f"weights     {parameters:,} parameters, stored as {', '.join(stored)}")
    for note in weights.notes:
        print(f"note        {note}")
    if weights.non_finite():
        print(f"warning: {weights.non_finite()}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
