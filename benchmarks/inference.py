"""The command `python -m benchmarks.inference`: images to logits, Flax against timm.

On a CPU every call is waited for before the next one starts; on a GPU, where that would time how calls are started,
only the last of a round. In bfloat16 both sides keep parameters and images in bfloat16; in float32 neither may round
matrix products to TF32.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.command import add_models, add_rounds, parser_of, run_sides
from benchmarks.task import ModelTask
from convert.command_line import leave


def main(argv: Sequence[str] | None = None, benchmark: str = "inference") -> int:
    """Runs the benchmark, inference or training; returns the exit status."""
    parser = parser_of(benchmark, f"Time CrossViT {benchmark}: Flax against timm at its best.")
    add_models(parser)
    add_rounds(parser, ModelTask.SIDES)
    args = parser.parse_args(argv)

    def tasks(device: str, folder: Path) -> Iterator[ModelTask]:
        for settings in models(args, device, folder):
            yield ModelTask(benchmark=benchmark, **settings)

    return run_sides(parser, args, tasks)


def models(args: argparse.Namespace, device: str, folder: Path) -> Iterator[dict[str, Any]]:
    """The settings of a task for each of --variants; its weights are written to the folder when it is asked for."""
    from benchmarks.sides.timm import write_weights

    for variant in args.variants:
        weights = folder / f"{variant}.safetensors"
        write_weights(variant, weights)
        settings = {"batch_size": args.batch_size, "dtype": args.dtype, "device": device}
        yield settings | {"variant": variant, "weights": str(weights)}


if __name__ == "__main__":
    leave(main())
