"""What the commands `train.evaluate` and `train.predict` share: the model, notes."""

import argparse
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from convert.command_line import Parser, at_least_one, image_size, share, weights_source
from convert.streams import tell_error

if TYPE_CHECKING:
    from train.data.tagged_images import TaggedImages
    from train.inference.model import Predictor

SOURCES = """\
SOURCE: hf-hub:timm/crossvit_tiny_240.in1k (any repository on the hub), a .safetensors, .pth or .bin file with timm's,
IBM's or Flax's names, an Orbax folder, or the folder of a training run (runs/X the weights of its best evaluation,
runs/X:last the last, runs/X:ema their average)"""
SMALLER_BATCH = "choose a smaller --batch-size"  # what helps against too little memory

_IMAGES_PER_PROCESS = 1000  # a process takes seconds to start, which fewer images do not take themselves


def add_model_flags(parser: Parser, *, batches: bool = True) -> None:
    """--weights, --image-size, --crop-pct, --exif, --precision, --attention-kernel and --quantize.

    Args:
        batches: --batch-size too.
    """
    parser.add_argument("--weights", type=weights_source, required=True, metavar="SOURCE", help="the weights to use")
    parser.add_argument(
        "--image-size",
        type=image_size,
        metavar="N|HxW",
        help="resample the position embeddings to this size (default: the weights' own)",
    )
    parser.add_argument(
        "--crop-pct", type=share, metavar="F", help="share of the resized image that is kept (default: the weights')"
    )
    parser.add_argument(
        "--exif",
        choices=("keep", "apply"),
        help="take images as they are stored, or turn them as their EXIF orientation says (default: as training did)",
    )
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        help="arithmetic; parameters are float32 (default: bfloat16 on accelerators, float32 otherwise)",
    )
    parser.add_argument(
        "--attention-kernel",
        choices=("auto", "xla", "cudnn"),
        default="auto",
        help="what computes self-attention: xla, or cudnn (NVIDIA GPUs from compute capability 8.0 on, bfloat16) "
        "(default: auto, which is cudnn where it can)",
    )
    parser.add_argument(
        "--quantize",
        choices=("int8", "int4"),
        help="round the linear layers' weights to this, and what they multiply to int8 (default: as they are)",
    )
    if batches:
        parser.add_argument(
            "--batch-size",
            type=at_least_one,
            metavar="N",
            help="images at a time, over all devices (default: what suits the devices)",
        )


def add_detection_flags(parser: Parser) -> None:
    """--score-threshold, --iou-threshold and --max-detections, which only detectors have; they are in `args` where
    they are given."""
    group = parser.add_argument_group("detectors")
    how = {"default": argparse.SUPPRESS, "type": share, "metavar": "F"}
    group.add_argument("--score-threshold", **how, help="boxes have a score above it (default: 0.05)")
    group.add_argument(
        "--iou-threshold",
        **how,
        help="of two boxes of a class that overlap more, the better is kept: intersection over union (default: 0.6)",
    )
    how |= {"type": at_least_one, "metavar": "N"}
    group.add_argument("--max-detections", **how, help="boxes of an image, the best (default: 100)")


def load_model(args: argparse.Namespace) -> "Predictor":
    """The model that the flags of `add_model_flags` and `add_detection_flags` ask for, and `--patch-size` where a
    command has that. Raises as `load_predictor` does."""
    from train.devices.process import keep_compiled_programs, keep_freed_memory
    from train.inference.model import load_predictor

    keep_freed_memory()
    keep_compiled_programs()
    settings = ("image_size", "crop_pct", "precision", "attention_kernel", "quantize", "exif")
    of_some = ("patch_size", "score_threshold", "iou_threshold", "max_detections")
    settings += tuple(name for name in of_some if name in args)
    return load_predictor(args.weights, **{name: getattr(args, name) for name in settings})


def exif_notes(args: argparse.Namespace, classifier: "Predictor", tagged: "TaggedImages") -> list[str]:
    """What was done with the images that have an EXIF orientation, if there were any."""
    why = "as in training"
    if args.exif is not None:
        why = "as asked for"
    elif classifier.trained_exif is None:
        why = "as timm does; the weights do not tell what training did, and --exif apply turns them"
    note = tagged.told(classifier.task.config.exif, why=why)
    return [note] if note else []


def tell_notes(prog: str, notes: Iterable[str]) -> None:
    """What the user should know about the weights, on stderr."""
    for note in notes:
        tell_error(f"{prog}: note: {note}")


def reading_processes(images: int) -> int:
    """How many processes are worth starting to read so many images; 0: threads of this one."""
    return min(os.cpu_count() or 1, images // _IMAGES_PER_PROCESS)
