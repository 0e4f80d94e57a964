"""`python -m train.evaluate --weights SOURCE --dataset ...`: how well weights classify the images of a data set."""

# What takes long to import is imported when it is needed: `--help` and wrong flags are answered at once, and worker
# processes, which import this module too, need none of it.
import argparse
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from convert.command_line import Parser, at_least_zero, leave
from convert.errors import SettingsError
from convert.paths import FOLDER_PREFIX
from train.config import TrainConfig, data_set, home_path
from train.inference.command import SOURCES, add_model_flags, load_model, progress_bar, run, tell_notes

if TYPE_CHECKING:
    from train.data.sources import Source
    from train.inference.model import Classifier
    from train.tasks.evaluation import Evaluation

_PROGRAM = "python -m train.evaluate"
_BATCHES_BEHIND = 2  # results are fetched so many batches late, so that the devices never wait for the host
_IMAGES_PER_WORKER = 1000  # a worker process takes seconds to start, which fewer images do not take themselves

_EPILOG = f"""\
{SOURCES}

exit status: 0 done, even if some images could not be read, which stderr names; 2 an error, and one line on stderr says
which
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as the arguments say; returns the exit status."""
    args = _parser().parse_args(argv)
    return run(_PROGRAM, lambda: _evaluate(args))


def _parser() -> Parser:
    parser = Parser(
        prog=_PROGRAM,
        description="Evaluate a CrossViT: top-1 and top-5 accuracy, loss, accuracy per class and a confusion matrix.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_flags(parser)
    parser.add_argument(
        "--dataset",
        type=data_set,
        required=True,
        metavar="DATA",
        help="digits, a prepared tensorflow-datasets name, or folder:PATH",
    )
    parser.add_argument(
        "--data-dir", type=home_path, metavar="DIR", help="where prepared data sets lie (default: tfds' own folder)"
    )
    parser.add_argument(
        "--split",
        choices=("held-out", "train", "all"),
        default="held-out",
        help="images to evaluate, as training splits them (default: held-out); all: every image of a folder:PATH that "
        "has no train/ in it",
    )
    parser.add_argument(
        "--val-fraction",
        type=float,
        default=TrainConfig.val_fraction,
        metavar="F",
        help="share of each class that training held out of such a folder (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=TrainConfig.seed, metavar="N", help="of that choice in training (default: 0)"
    )
    parser.add_argument(
        "--workers",
        type=at_least_zero,
        metavar="N",
        help="processes that read images; 0: threads only (default: one per CPU core, fewer for small data sets)",
    )
    parser.add_argument(
        "--output",
        type=home_path,
        metavar="DIR",
        help="folder for evaluation.json, per_class.csv, confusion.csv and confusion.png; those of an earlier "
        "evaluation are replaced (default: nothing is written)",
    )
    return parser


def _evaluate(args: argparse.Namespace) -> int:
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
        f"{f', weights rounded to {args.quantize}' * (args.quantize is not None)}, {classifier.devices}\n"
        f"{args.dataset}: {len(source)} images ({split})",
        flush=True,
    )
    workers = args.workers
    if workers is None:
        workers = min(os.cpu_count() or 1, len(source) // _IMAGES_PER_WORKER)
    batch_size = classifier.batch_size(args.batch_size, len(source))
    evaluation = evaluate(classifier, source, classes, batch_size=batch_size, workers=workers)
    print(evaluation.summary())
    if output:
        from train.tasks.evaluation import write_evaluation

        names = [data_names[label] for label in np.argsort(classes)]  # in the order of the weights
        about = {
            "weights": args.weights,
            "dataset": args.dataset,
            "split": split,
            "model": config.name,
            "image_size": config.image_size,
            "crop_pct": config.crop_pct,
            "precision": classifier.precision,
            "quantize": args.quantize,
        }
        print(f"written     {', '.join(write_evaluation(evaluation, output, names=names, about=about))} in {output}")
    return 0


# --- what is evaluated ---


def _open_data(args: argparse.Namespace) -> "tuple[Source, tuple[str, ...], str, list[str]]":
    """The images asked for, the names of their classes, in words which images they are, and a note on that."""
    config = TrainConfig(dataset=args.dataset, data_dir=args.data_dir, val_fraction=args.val_fraction, seed=args.seed)

    from train.data.sources import open_image_sets

    folder = Path(args.dataset.removeprefix(FOLDER_PREFIX)) if args.dataset.startswith(FOLDER_PREFIX) else None
    is_unsplit = folder is not None and folder.is_dir() and not (folder / "train").is_dir()
    if args.split == "all":
        if not is_unsplit:
            raise SettingsError("--split all is for a folder:PATH of class folders; choose held-out or train here")
        return *_open_whole_folder(folder), "all of them", []
    sets = open_image_sets(config)
    note = [f"{folder} has no train/ and val/: it is split as in training; --split all takes all"] if is_unsplit else []
    if args.split == "train":
        return sets.train, sets.class_names, f"training images; held out: {sets.held_out_split}", note
    return sets.held_out, sets.class_names, sets.held_out_split, note


def _open_whole_folder(folder: Path) -> "tuple[Source, tuple[str, ...]]":
    from train.data.sources import FolderSource, list_images

    images = list_images(folder)
    labels = np.repeat(np.arange(len(images)), [len(files) for files in images.values()])
    return FolderSource(str(folder), tuple(file for files in images.values() for file in files), labels), tuple(images)


def match_classes(
    data_names: Sequence[str], weight_names: Sequence[str] | None, num_classes: int
) -> tuple[Int[np.ndarray, " classes"], list[str]]:
    """For each label of a data set, the output of the model that stands for it; and what the user should know of that.

    Args:
        data_names: of the data set's classes, in the order of the labels.
        weight_names: of the model's classes, in the order of the outputs; none: not known.
        num_classes: outputs of the model.

    Raises SettingsError if the data set has other classes than the model.
    """
    from train.data.sources import listed

    counts = f"the data set has {len(data_names)} classes, the weights have {num_classes}"
    same = np.arange(len(data_names))
    if weight_names is None:
        if len(data_names) != num_classes:
            raise SettingsError(counts)
        return same, ["the weights know no class names: output i is taken for the data set's class i"]
    if tuple(data_names) == tuple(weight_names):
        return same, []
    in_data, in_weights = set(data_names), set(weight_names)
    only = {
        "the data set": [name for name in data_names if name not in in_weights],
        "the weights": [name for name in weight_names if name not in in_data],
    }
    # a name that stands for two classes tells neither
    if any(only.values()) or not len(in_data) == len(in_weights) == len(data_names) == num_classes:
        differences = [f"only in {place}: {listed(names[:3], len(names))}" for place, names in only.items() if names]
        raise SettingsError("; ".join([counts, *(differences or ["some have the same name"])]))
    place = {name: index for index, name in enumerate(weight_names)}
    note = "the data set has the weights' classes in another order: they are matched by name"
    return np.array([place[name] for name in data_names]), [note]


# --- the evaluation ---


def evaluate(
    classifier: "Classifier", source: "Source", classes: Int[np.ndarray, " classes"], *, batch_size: int, workers: int
) -> "Evaluation":
    """Classify all images of a source. Unreadable ones are named on stderr; a progress bar is there on a terminal.

    Args:
        classes: see `match_classes`.
        batch_size: a multiple of the number of devices.
        workers: processes that read images; 0: threads of this process.

    Raises:
        SettingsError: no image could be read.
        DataError: the data set cannot be read any further.
    """
    import jax
    import jax.numpy as jnp

    from train.data.bad_images import BadImages
    from train.data.batches import eval_batches
    from train.data.prefetch import device_batches
    from train.images.transforms import eval_transform
    from train.optim.step import TOP5_CLASSES, soft_target_cross_entropy, within_top
    from train.tasks.evaluation import Evaluation

    config = classifier.config

    def forward(model: Any, batch: Any) -> dict[str, jax.Array]:
        logits = model(batch["image"])
        labels = jnp.asarray(classes)[batch["label"]]
        return {
            "label": labels,
            "predicted": jnp.argmax(logits, axis=1),
            "top5": within_top(5, logits, labels),
            "loss": soft_target_cross_entropy(logits, jax.nn.one_hot(labels, config.num_classes, dtype=logits.dtype)),
            "mask": batch["mask"],
        }

    sums = {"images": 0, "top5": 0, "loss": 0.0}
    confusion = np.zeros((config.num_classes, config.num_classes), np.int64)

    def count(outputs: dict[str, jax.Array]) -> None:
        outputs = jax.device_get(outputs)
        counted = outputs["mask"] > 0
        sums["images"] += int(counted.sum())
        sums["top5"] += int(outputs["top5"][counted].sum())
        sums["loss"] += float(outputs["loss"][counted].sum(dtype=np.float64))
        np.add.at(confusion, (outputs["label"][counted], outputs["predicted"][counted]), 1)

    batches = eval_batches(source, eval_transform(config), batch_size=batch_size, workers=workers)
    steps = -(-len(source) // batch_size)
    pending: deque[dict[str, jax.Array]] = deque()
    with (
        closing(device_batches(batches, classifier.mesh)) as stream,
        progress_bar(len(source)) as bar,
    ):
        bad_images = BadImages(source, lambda line: bar.write(f"{_PROGRAM}: {line}", file=sys.stderr))
        shapes = {
            "image": jax.ShapeDtypeStruct((batch_size, *config.image_size, 3), jnp.float32),
            "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
            "mask": jax.ShapeDtypeStruct((batch_size,), jnp.float32),
        }
        compiled = classifier.compile(forward, shapes)  # while the first images are read
        start = None  # when the first images are there: the start of worker processes says nothing about speed
        for step in range(steps + _BATCHES_BEHIND):
            if step < steps:
                batch = next(stream)
                start = start or time.perf_counter()
                bad_images.add(batch["bad_indices"])
                pending.append(compiled({name: batch[name] for name in shapes}))
            if step >= _BATCHES_BEHIND:
                count(pending.popleft())
                bar.update(min(batch_size, len(source) - bar.n))
        seconds = time.perf_counter() - start
    images = sums["images"]
    if not images:
        raise SettingsError(f"none of the {len(source)} images could be read")
    top5 = 100 * sums["top5"] / images if config.num_classes >= TOP5_CLASSES else None
    return Evaluation(images, bad_images.count, sums["loss"] / images, top5, confusion, seconds)


if __name__ == "__main__":
    leave(main())
