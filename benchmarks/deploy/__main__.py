"""The command `python -m benchmarks.deploy`: what each shipped form of a trained model costs, and what it is worth.

Size, latency at batch 1, throughput at batch 8 and top-1 accuracy on the held-out images, beside torch in float32. A
form whose logits are further from those of its weights in float32 than converters accept is not timed.
"""

from collections.abc import Iterator, Sequence

from benchmarks.command import EPILOG, add_data, add_rounds, parser_of, run_benchmark
from benchmarks.result import Content
from convert.command_line import at_least_one, leave, weights_source
from convert.errors import require
from convert.export.compare import ONNX_PACKAGES

_EPILOG = f"""\
RUN: a training run, whose settings tell the data set; or any SOURCE of python -m convert, with --dataset. A run with
--qat int8 joins the run before it, of the same variant, image size, data set and classes. Static int8 is calibrated on
training images.

{EPILOG}"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark as the arguments say; returns the exit status."""
    parser = parser_of("deploy", "Compare the shipped forms of trained CrossViTs: size, speed, accuracy.", _EPILOG)
    add = parser.add_argument
    add("--runs", type=weights_source, nargs="+", required=True, metavar="RUN", help="trained runs")
    add_data(parser)
    add("--images", type=at_least_one, default=2000, metavar="N", help="held-out ones to try at most; default: 2000")
    add("--calibration-images", type=at_least_one, default=128, metavar="N", help="training images; default: 128")
    add_rounds(parser)
    args = parser.parse_args(argv)

    def contents() -> Iterator[Content]:
        require("the ONNX forms", *ONNX_PACKAGES, verb="need")
        from benchmarks.deploy.measure import measured_models  # late: the sides' processes import this module

        yield from measured_models(args)

    return run_benchmark(parser, args, contents)


if __name__ == "__main__":
    leave(main())
