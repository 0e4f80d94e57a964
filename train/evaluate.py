"""`python -m train.evaluate --weights SOURCE --dataset ...`: how well weights classify the images of a data set."""

# What takes long to import is imported when it is needed: `--help` and wrong flags are answered at once, and worker
# processes, which import this module too, need none of it.
import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from convert.command_line import Parser, at_least_zero, data_set, leave, run
from convert.errors import SettingsError
from convert.files import FOLDER_PREFIX, home_path
from train.config import TrainConfig
from train.inference.command import SMALLER_BATCH, SOURCES, add_model_flags, load_model, reading_processes, tell_notes

if TYPE_CHECKING:
    from train.data.sources import Source

_PROGRAM = "python -m train.evaluate"

_EPILOG = f"""\
{SOURCES}

exit status: 0 done, even if some images could not be read, which stderr names; 2 an error, and one line on stderr says
which
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as the arguments say; returns the exit status."""
    args = _parser().parse_args(argv)
    return run(_PROGRAM, lambda: _evaluate(args), remedy=SMALLER_BATCH)


def _parser() -> Parser:
    parser = Parser(
        prog=_PROGRAM,
        description="Evaluate a CrossViT: top-1 and top-5 accuracy, loss, accuracy per class and a confusion matrix.",
        epilog=_EPILOG,
    )
    add_model_flags(parser)
    add = parser.add_argument
    add(
        "--dataset",
        type=data_set,
        required=True,
        metavar="DATA",
        help="digits, a prepared tensorflow-datasets name, or folder:PATH",
    )
    add("--data-dir", type=home_path, metavar="DIR", help="where prepared data sets lie (default: tfds' own folder)")
    add(
        "--split",
        choices=("held-out", "train", "all"),
        default="held-out",
        help="images to evaluate, as training splits them (default: held-out); all: every image of a folder:PATH that "
        "has no train/ in it",
    )
    add(
        "--val-fraction",
        type=float,
        default=TrainConfig.val_fraction,
        metavar="F",
        help="share of each class that training held out of such a folder (default: %(default)s)",
    )
    add("--seed", type=int, default=TrainConfig.seed, metavar="N", help="of that choice in training (default: 0)")
    add(
        "--workers",
        type=at_least_zero,
        metavar="N",
        help="processes that read images; 0: threads only (default: one per CPU core, fewer for small data sets)",
    )
    add(
        "--output",
        type=home_path,
        metavar="DIR",
        help="folder for evaluation.json, per_class.csv, confusion.csv and confusion.png; those of an earlier "
        "evaluation are replaced (default: nothing is written)",
    )
    return parser


def _evaluate(args: argparse.Namespace) -> int:
    from train.data.bad_images import BadImages
    from train.inference.evaluation import evaluate
    from train.run.progress import open_bar
    from train.tasks.classification import Matched, match_classes

    source, data_names, split, split_note = _open_data(args)
    classifier = load_model(args)
    config = classifier.config
    classes, class_note = match_classes(data_names, classifier.class_names, config.num_classes)
    tell_notes(_PROGRAM, [*split_note, *classifier.notes, *class_note])
    output = Path(args.output) if args.output else None
    if output:
        output.mkdir(parents=True, exist_ok=True)
    height, width = config.image_size
    print(
        f"CrossViT {config.name} at {height} x {width} pixels (crop {config.crop_pct:g}), "
        f"{config.num_classes} classes, {classifier.precision}"
        f"{f', weights rounded to {args.quantize}' * (args.quantize is not None)}, {classifier.device_summary}\n"
        f"{args.dataset}: {len(source)} images ({split})",
        flush=True,
    )
    workers = reading_processes(len(source)) if args.workers is None else args.workers
    names = tuple(data_names[label] for label in np.argsort(classes))  # in the order of the weights
    classifier = dataclasses.replace(classifier, task=dataclasses.replace(classifier.task, class_names=names))
    scores = classifier.task.scores()
    batch_size = classifier.batch_size(args.batch_size, len(source))
    source = Matched(source, tuple(classes.tolist()))
    with open_bar(total=len(source), unit=" images") as bar:
        bad_images = BadImages(source, lambda line: bar.write(f"{_PROGRAM}: {line}", file=sys.stderr))
        images_per_s = evaluate(
            classifier, source, scores, bad_images, batch_size=batch_size, workers=workers, advance=bar.update
        )
    values = scores.values()
    for metric in classifier.task.metrics:
        print(f"{metric.label:11} {values[metric.name]:.2f}{' %' if metric.unit == '%' else ''}")
    print(f"loss        {values['loss']:.4f}")
    print(f"images      {values['images']} (unreadable: {bad_images.count})")
    print(f"speed       {images_per_s:.0f} images/s")
    if output:
        about = {
            "weights": args.weights,
            "dataset": args.dataset,
            "split": split,
            "model": config.name,
            "image_size": config.image_size,
            "crop_pct": config.crop_pct,
            "precision": classifier.precision,
            "quantize": args.quantize,
            "bad_images": bad_images.count,
            "images_per_s": images_per_s,
        }
        print(f"written     {', '.join(scores.write(output, about=about))} in {output}")
    return 0


# --- what is evaluated ---


def _open_data(args: argparse.Namespace) -> "tuple[Source, tuple[str, ...], str, list[str]]":
    """The images asked for, the names of their classes, in words which images they are, and a note on that."""
    config = TrainConfig(dataset=args.dataset, data_dir=args.data_dir, val_fraction=args.val_fraction, seed=args.seed)

    from train.data.datasets import open_image_sets
    from train.data.folder import folder_source, list_images

    folder = Path(args.dataset.removeprefix(FOLDER_PREFIX)) if args.dataset.startswith(FOLDER_PREFIX) else None
    is_unsplit = folder is not None and folder.is_dir() and not (folder / "train").is_dir()
    if args.split == "all":
        if not is_unsplit:
            raise SettingsError("--split all is for a folder:PATH of class folders; choose held-out or train here")
        images = list_images(folder)
        return folder_source(folder, images), tuple(images), "all of them", []
    sets = open_image_sets(config)
    note = [f"{folder} has no train/ and val/: it is split as in training; --split all takes all"] if is_unsplit else []
    if args.split == "train":
        return sets.train, sets.class_names, f"training images; held out: {sets.held_out_split}", note
    return sets.held_out, sets.class_names, sets.held_out_split, note


if __name__ == "__main__":
    leave(main())
