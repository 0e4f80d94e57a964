"""The command `python -m benchmarks.detection`: our detector against torchvision's FCOS on the PyTorch twin's backbone.

From images to boxes, and one training step: forward, FCOS's losses, backward, AdamW. On a CPU, in float32; torchvision
is eager, and with its networks compiled. About a thousand scores of an image are above the threshold.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.command import add_rounds, add_variants, parser_of, run_sides
from benchmarks.task import DetectionTask
from convert.command_line import leave

_OFTEN = -6.5  # the bias of classes with which about a thousand scores of an image are above 0.05


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = parser_of("detection", "Time CrossViT detectors: Flax against torchvision's FCOS on the same backbone.")
    add_variants(parser, batch=2)
    add_rounds(parser, DetectionTask.SIDES, repeats=5)
    args = parser.parse_args(argv)

    def tasks(device: str, folder: Path) -> Iterator[DetectionTask]:
        for variant in args.variants:
            known = {"variant": variant, "batch_size": args.batch_size, "weights": str(folder / "w.safetensors")}
            inference, training = (DetectionTask(benchmark=name, **known) for name in ("inference", "training"))
            write_weights(inference)
            yield from (inference, training)

    return run_sides(parser, args, tasks)


def write_weights(task: DetectionTask) -> None:
    """Random weights of the task's detector."""
    import torch

    from benchmarks.sides.timm import random_weights
    from convert import save
    from crossvit_torch import CrossViTDetector

    with torch.device("meta"):
        tensors = random_weights(CrossViTDetector(task.config()))
    tensors["head.classification_head.cls_logits.bias"] += _OFTEN
    save(tensors, task.config(), task.weights, overwrite=True)


if __name__ == "__main__":
    leave(main())
