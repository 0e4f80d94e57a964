"""The command `python -m benchmarks.end_to_end`: training fed from JPEG files on a disk, Flax against timm.

Each pipeline is timed beside its own step alone: Flax's step with the trainer's pipeline, which augments on the device
(flax-device) or in the workers (flax-host), and timm's with timm's loader (timm-loader). All have the paper's recipe:
crop, flip, RandAugment, erasing, Mixup and CutMix. The steps alone are sides of the training benchmark, whose
batch lies on the device. A round begins with empty queues, see `benchmarks.sides.fed`.
"""

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from benchmarks.command import add_models, add_rounds, models, parser_of, run_sides
from benchmarks.task import PHOTOGRAPH_CLASSES, DataTask, EndToEndTask, usable_cores
from convert.command_line import at_least_one, leave
from convert.errors import require

_DIFFERENT = 256  # photographs


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = parser_of("end_to_end", "Time training with its input pipeline, JPEG files to updated weights.")
    add_models(parser)
    cores = usable_cores()
    add = parser.add_argument
    add("--workers", type=at_least_one, default=cores, metavar="N", help=f"default: one for each core, here {cores}")
    add("--images", type=at_least_one, default=20_000, metavar="N", help="JPEG files in an epoch; default: 20000")
    add_rounds(parser, EndToEndTask.SIDES, repeats=5)
    args = parser.parse_args(argv)
    if args.images < args.batch_size:
        parser.error(f"--images {args.images} do not fill a batch of {args.batch_size}")

    def tasks(device: str, folder: Path) -> Iterator[EndToEndTask]:
        require("the input pipelines", "numba", "simplejpeg", "sklearn", "grain", extra="train", verb="need")
        write_photographs(folder, args.images)
        make = partial(EndToEndTask, folder=str(folder), files=args.images, workers=args.workers)
        yield from models(args, device, folder, make)

    return run_sides(parser, args, tasks)


def write_photographs(folder: Path, count: int) -> None:
    """So many JPEG files of the size of ImageNet's, in the class folders of `folder/train`.

    They are the files of a few hundred photographs, each under many names: an epoch is long, as it is in a real run.
    `folder/val` is the same folder once more: a data set of the trainer's has one, which nobody looks at here.
    """
    different = folder / "photographs"
    different.mkdir()
    samples = DataTask(batch_size=min(count, _DIFFERENT)).samples()
    for number, sample in enumerate(samples):
        (different / f"{number}.jpg").write_bytes(sample["image"])
    for number in range(count):
        place = folder / "train" / f"class-{number % PHOTOGRAPH_CLASSES}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.jpg").hardlink_to(different / f"{number % len(samples)}.jpg")
    os.symlink("train", folder / "val")


if __name__ == "__main__":
    leave(main())
