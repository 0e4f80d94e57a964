"""The command `python -m benchmarks.detection`: our Flax detector against torchvision's FCOS on the same backbone.

From images to boxes, and one training step: forward, FCOS's losses, backward, AdamW. torchvision's FCOS stands on the
PyTorch twin's backbone, eager and with its networks compiled. On a CPU, in float32. Weights are random, and about a
thousand candidates of an image are above the threshold of scores.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.command import add_rounds, parser_of, run_sides, variant_name
from benchmarks.task import DetectionTask
from convert.command_line import at_least_one, leave

_OFTEN = -6.5  # the bias of classes with which about a thousand scores of an image are above 0.05


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = parser_of(
        "detection", "Time our detector, from images to boxes and a training step, beside torchvision's."
    )
    parser.add_argument("--variant", type=variant_name, default="ti", metavar="NAME", help="default: ti")
    parser.add_argument("--batch-size", type=at_least_one, default=2, metavar="N", help="default: 2")
    add_rounds(parser, DetectionTask.SIDES, repeats=5)
    args = parser.parse_args(argv)

    def tasks(_: str, folder: Path) -> Iterator[DetectionTask]:
        settings = {"variant": args.variant, "batch_size": args.batch_size, "weights": str(folder / "d.safetensors")}
        both = [DetectionTask(benchmark=benchmark, **settings) for benchmark in ("inference", "training")]
        write_weights(both[0])
        yield from both

    return run_sides(parser, args, tasks, tuple(DetectionTask.SIDES))


def write_weights(task: DetectionTask) -> None:
    """Random weights of the detector."""
    import torch

    from benchmarks.sides.timm import noise
    from convert import save
    from crossvit_torch import CrossViTDetector

    with torch.device("meta"):
        model = CrossViTDetector(task.config())
    tensors = noise(model)
    tensors["head.classification_head.cls_logits.bias"] += _OFTEN
    save(tensors, task.config(), task.weights)


if __name__ == "__main__":
    leave(main())
