"""The command `python -m benchmarks.detection`: our detector against torchvision's FCOS on the PyTorch twin's backbone.

From images to boxes, and one training step: forward, FCOS's losses, backward, AdamW. On a CPU, in float32; torchvision
is eager, and with its networks compiled. About a thousand scores of an image are above the threshold.
"""

from collections.abc import Sequence
from functools import partial

from benchmarks.command import add_rounds, add_variants, models, parser_of, run_sides
from benchmarks.task import DetectionTask
from convert.command_line import leave


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = parser_of("detection", "Time CrossViT detectors: Flax against torchvision's FCOS on the same backbone.")
    add_variants(parser, batch=2)
    add_rounds(parser, DetectionTask.SIDES, repeats=5)
    args = parser.parse_args(argv)
    both = [partial(DetectionTask, benchmark=benchmark) for benchmark in ("inference", "training")]
    return run_sides(parser, args, lambda *place: (task for make in both for task in models(args, *place, make)))


if __name__ == "__main__":
    leave(main())
