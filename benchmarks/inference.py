"""The command `python -m benchmarks.inference`: images to logits, Flax against timm.

On a CPU every call is waited for before the next one starts; on a GPU, where that would time how calls are started,
only the last of a round. In bfloat16 both sides keep parameters and images in bfloat16; in float32 neither may round
matrix products to TF32.
"""

from collections.abc import Sequence
from functools import partial

from benchmarks.command import add_models, add_rounds, models, parser_of, run_sides
from benchmarks.task import ModelTask
from convert.command_line import leave


def main(argv: Sequence[str] | None = None, benchmark: str = "inference") -> int:
    """Runs the benchmark, inference or training; returns the exit status."""
    parser = parser_of(benchmark, f"Time CrossViT {benchmark}: Flax against timm at its best.")
    add_models(parser)
    add_rounds(parser, ModelTask.SIDES)
    args = parser.parse_args(argv)
    return run_sides(parser, args, lambda *place: models(args, *place, partial(ModelTask, benchmark=benchmark)))


if __name__ == "__main__":
    leave(main())
