"""The command `python -m convert.torchao SOURCE model.pt`."""

import argparse
import dataclasses
from collections.abc import Sequence

from convert.command_line import Parser, leave, run
from convert.report import tell_result, tell_weights

_EPILOG = """\
SOURCE    what python -m convert takes, say the folder of a run with --qat
model.pt  the PyTorch twin, its linear layers in integers, for convert.export.torchao.load_torchao; the file is only
          kept if it computes what SOURCE does

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
    parser.add_argument(
        "--license",
        metavar="TEXT",
        help="what model.pt says of its weights; default: Apache-2.0, as the published ones are",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace model.pt if it exists")
    return parser


def _quantise(args: argparse.Namespace) -> int:
    # imported late: --help and a mistyped command line need not wait for the frameworks
    from convert.export.int8 import check_weights
    from convert.export.torchao import check_torchao, export_torchao
    from convert.models import load_weights
    from convert.tensors import DTYPES

    options = {"compare": args.compare, "overwrite": args.overwrite}
    check_torchao(args.destination, **options)
    weights = load_weights(args.source)
    if args.license is not None:
        weights = dataclasses.replace(weights, license=args.license)
    stored = ", ".join(weights.dtypes)
    if args.dtype:
        weights = weights.astype(DTYPES[args.dtype])
    check_weights(weights)
    tell_weights(weights, stored)
    path, difference = export_torchao(weights, args.destination, args.quantize, **options)
    return tell_result(path, difference, kept=difference.passed)


if __name__ == "__main__":
    leave(main())
