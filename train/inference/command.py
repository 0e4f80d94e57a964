"""What the commands `train.evaluate` and `train.predict` share: the model, notes."""

import argparse
import dataclasses
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from convert.command_line import (
    Parser,
    Program,
    above_zero,
    at_least_one,
    image_size,
    patch_size,
    reduce_tokens,
    share,
    threshold,
    weights_source,
)
from convert.errors import SettingsError
from convert.streams import tell_error
from crossvit_jax.files import MAX_PIXELS

if TYPE_CHECKING:
    from train.data.tagged_images import TaggedImages
    from train.images.tiles import Tiling
    from train.inference.model import Classifier, Predictor

SOURCES = """\
SOURCE: hf-hub:timm/crossvit_tiny_240.in1k (any repository on the hub), a .safetensors, .pth or .bin file with timm's,
IBM's or Flax's names, an Orbax folder, or the folder of a training run (runs/X the weights of its best evaluation,
runs/X:last the last, runs/X:ema their average)"""
SMALLER_BATCH = "choose a smaller --batch-size"  # what helps against too little memory

AUTO = "auto"
OVERLAP, MOST_OVERLAP = 0.25, 0.9
_IMAGES_PER_PROCESS = 1000  # a process takes seconds to start, which fewer images do not take themselves


def add_model_flags(parser: Parser, *, batches: bool = True, max_pixels: int = MAX_PIXELS) -> None:
    """--weights, --image-size, --crop-pct, --exif, --precision, --fp32-residual, --attention-kernel, --reduce-tokens,
    --quantize and --max-pixels.

    Args:
        batches: --batch-size too.
        max_pixels: default of the flag.
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
        choices=("float32", "bfloat16", "float16"),
        help="arithmetic; parameters are float32 (default: bfloat16 on accelerators, float16 on GPUs that have none, "
        "float32 on CPUs)",
    )
    parser.add_argument(
        "--fp32-residual",
        action="store_true",
        help="in half precision, keep what flows from block to block in float32, as torch.autocast does",
    )
    parser.add_argument(
        "--attention-kernel",
        choices=("auto", "xla", "cudnn", "tpu"),
        default="auto",
        help="what computes self-attention: xla, cudnn (NVIDIA GPUs from compute capability 8.0 on, in half "
        "precision), or tpu (a kernel for TPUs; xla on other devices) (default: auto, which is cudnn where it can, and "
        "tpu on TPUs)",
    )
    parser.add_argument(
        "--reduce-tokens",
        type=reduce_tokens,
        metavar="HOW",
        help="of classifiers: compute with fewer tokens: merge:N, fusion:SHARE or prune:SHARE; none: with all "
        "(default: as the weights were trained)",
    )
    parser.add_argument(
        "--quantize",
        choices=("int8", "int4"),
        help="round the linear layers' weights to this, and what they multiply to int8 (default: as they are)",
    )
    parser.add_argument(
        "--max-pixels",
        type=at_least_one,
        metavar="N",
        default=max_pixels,
        help=f"images of more pixels are not decoded, by their header (default: {max_pixels:,})",
    )
    if batches:
        parser.add_argument(
            "--batch-size",
            type=at_least_one,
            metavar="N",
            help="images at a time, over all devices (default: what suits the devices)",
        )


def add_patch_size_flags(parser: Parser, *others: str) -> None:
    """--patch-size and --budget-ms.

    Args:
        others: what --patch-size may say besides, as a text of its help begins: "all: a table of …".
    """
    words = [AUTO, *(text.partition(":")[0] for text in others)]
    parser.add_argument(
        "--patch-size",
        type=lambda text: text if text in words else patch_size(text),
        metavar="|".join(["N,N", *words]),
        help="of classifiers: resize kernels and positions to patches of these pixels, a number for each branch; "
        f"{AUTO}: those that --budget-ms allows, or without it larger ones for pictures with less in them, by the "
        f"entropy of their grey levels{''.join(f'; {text}' for text in others)} (default: the weights' own)",
    )
    parser.add_argument(
        "--budget-ms",
        type=above_zero,
        metavar="N",
        help=f"with --patch-size {AUTO}: the milliseconds that the model may take for a picture, of a full batch on "
        "these devices; each patch size is timed",
    )


def add_detection_flags(parser: Parser) -> None:
    """--score-threshold, --iou-threshold and --max-detections, which only detectors have; they are in `args` where
    they are given."""
    group = parser.add_argument_group("detectors")
    how = {"default": argparse.SUPPRESS, "type": threshold, "metavar": "F"}
    group.add_argument("--score-threshold", **how, help="boxes have a score above it (default: 0.05)")
    group.add_argument(
        "--iou-threshold",
        **how,
        help="of two boxes of a class that overlap more, the better is kept: intersection over union (default: 0.6)",
    )
    how |= {"type": at_least_one, "metavar": "N"}
    group.add_argument("--max-detections", **how, help="boxes of an image, the best (default: 100)")


def add_tiling_flags(parser: Parser) -> None:
    """--tile and --overlap, see `tiling_of`."""
    group = parser.add_argument_group("large pictures (detectors and segmenters)")
    group.add_argument(
        "--tile",
        type=at_least_one,
        metavar="SIDE",
        help="cut pictures in windows of so many of their pixels, each of which the model sees at its own size: boxes "
        "are suppressed once over all windows of a picture, logits averaged (default: whole pictures)",
    )
    group.add_argument(
        "--overlap",
        type=_overlap,
        metavar="F",
        help=f"of neighbouring windows, as a share of SIDE: from 0 to {MOST_OVERLAP:g} (default: {OVERLAP:g})",
    )


def _overlap(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= MOST_OVERLAP:
        raise argparse.ArgumentTypeError(f"must be from 0 to {MOST_OVERLAP:g}; got {text!r}")
    return value


def tiling_of(args: argparse.Namespace, learned: str) -> "Tiling | None":
    """How pictures are to be cut, if they are. Raises SettingsError where that makes no sense.

    Args:
        learned: the task of the model.
    """
    if args.tile is None:
        if args.overlap is not None:
            raise SettingsError("--overlap is of the windows of --tile, which is not given")
        return None
    if learned == "classification":
        raise SettingsError(f"--tile is not for {learned}, which {args.weights} is for")
    from train.images.tiles import Tiling

    return Tiling(args.tile, OVERLAP if args.overlap is None else args.overlap)


def load_model(args: argparse.Namespace) -> "Predictor":
    """The model that the flags of `add_model_flags` and `add_detection_flags` ask for, and `--patch-size` where a
    command has that. Raises as `load_predictor` does."""
    from crossvit_jax.preprocess import limit_pixels
    from train.devices.process import keep_compiled_programs, keep_freed_memory
    from train.inference.model import load_classifier, load_predictor

    keep_freed_memory()
    keep_compiled_programs()
    limit_pixels(args.max_pixels)
    settings = ("image_size", "crop_pct", "precision", "fp32_residual", "attention_kernel", "reduce_tokens")
    settings += ("quantize", "exif")
    of_some = ("patch_size", "score_threshold", "iou_threshold", "max_detections")
    settings += tuple(name for name in of_some if name in args)
    settings = {name: getattr(args, name) for name in settings}
    budget = getattr(args, "budget_ms", None)
    if settings.get("patch_size") != AUTO:
        if budget is not None:
            raise SettingsError(f"--budget-ms is for --patch-size {AUTO}")
        return load_predictor(args.weights, **settings)
    from train.inference.allocation import affordable, allocating

    def load(size: tuple[int, ...] | None) -> "Classifier":
        return load_classifier(args.weights, **settings | {"patch_size": size})

    if budget is None:
        return allocating(load)
    classifier, notes = affordable(load, lambda classifier: classifier.batch_size(args.batch_size, None), budget)
    return dataclasses.replace(classifier, notes=(*classifier.notes, *notes))


def exif_notes(args: argparse.Namespace, classifier: "Predictor", tagged: "TaggedImages") -> list[str]:
    """What was done with the images that have an EXIF orientation, if there were any."""
    why = "as in training"
    if args.exif is not None:
        why = "as asked for"
    elif classifier.trained_exif is None:
        why = "as timm does; the weights do not tell what training did, and --exif apply turns them"
    note = tagged.told(classifier.task.config.exif, why=why)
    return [note] if note else []


def tell_notes(prog: Program, notes: Iterable[str]) -> None:
    """What the user should know about the weights, on stderr."""
    for note in notes:
        tell_error(f"{prog}: note: {note}")


def reading_processes(images: int) -> int:
    """How many processes are worth starting to read so many images; 0: threads of this one."""
    return min(os.cpu_count() or 1, images // _IMAGES_PER_PROCESS)
