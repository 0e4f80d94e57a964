"""`python -m train.evaluate --weights SOURCE --dataset ...`: how well weights classify the images of a data set."""

# What takes long to import is imported when it is needed: `--help` and wrong flags are answered at once, and worker
# processes, which import this module too, need none of it.
import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.class_names import NATURAL, TEXT, in_order, read_names, unlike_timm
from convert.command_line import Parser, Program, at_least_zero, data_set, leave, run
from convert.errors import SettingsError, require
from convert.files import home_path
from convert.streams import safe
from train.config import TrainConfig, class_order
from train.inference.command import (
    AUTO,
    SMALLER_BATCH,
    SOURCES,
    add_detection_flags,
    add_model_flags,
    add_patch_size_flags,
    add_tiling_flags,
    exif_notes,
    load_model,
    reading_processes,
    tell_notes,
    tiling_of,
)

if TYPE_CHECKING:
    from train.data.sources import Source
    from train.images.tiles import Tiling
    from train.inference.allocation import Allocating
    from train.inference.dataset import Data
    from train.inference.model import Classifier, Predictor
    from train.tasks.task import Scores

_PROGRAM = Program("train.evaluate")
_ALL = "all"
_DATA = ("dataset", "data_dir", "seed", "val_fraction")  # flags that a run can tell

_EPILOG = f"""\
{SOURCES}

exit status: 0 done, even if some images could not be read, which stderr names; 2 an error, and one line on stderr says
which

examples:
  python -m train.evaluate --weights runs/X --output report/
  python -m train.evaluate --weights hf-hub:timm/crossvit_tiny_240.in1k --dataset folder:imagenet --split val
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as the arguments say; returns the exit status."""
    args = _parser().parse_args(argv)
    return run(_PROGRAM, lambda: _evaluate(args), remedy=SMALLER_BATCH)


def _parser() -> Parser:
    parser = Parser(
        prog=_PROGRAM,
        description="Evaluate a CrossViT. A classifier: top-1 and top-5 accuracy, loss, precision, recall, F1, "
        "calibration error, rates per class, a confusion matrix, and the prediction for every image. A detector: the "
        "twelve figures of COCO. A segmenter: mean intersection over union, and the rates of each class.",
        epilog=_EPILOG,
    )
    add_model_flags(parser)
    add = parser.add_argument
    add_patch_size_flags(
        parser, f"{_ALL}: a table of those trained with, or of usual ones, with their cost, speed and top-1"
    )
    add(
        "--dataset",
        type=data_set,
        default=argparse.SUPPRESS,
        metavar="DATA",
        help="digits, folder:PATH, csv:FILE, hf:NAME, or a prepared tensorflow-datasets name; for detectors digits, "
        "coco:PATH, voc:PATH or yolo:FILE; for segmenters digits or masks:PATH (default: that of the run, where SOURCE "
        "is in the folder of one; what it held out is checked)",
    )
    add(
        "--data-dir",
        type=home_path,
        default=argparse.SUPPRESS,
        metavar="DIR",
        help="where prepared data sets lie (default: the run's, or tfds' own folder)",
    )
    add(
        "--split",
        choices=("held-out", "train", "val", "test", "all"),
        default="held-out",
        help="images to evaluate: held-out or train, as training splits them (default: held-out); val or test: those "
        "of a folder:PATH, csv:FILE or hf:NAME; all: every image of a folder or list without splits",
    )
    add(
        "--class-order",
        type=class_order,
        metavar="ORDER",
        help="which class each output of weights without class names is for: natural (timm's: class2 before class10, "
        "whatever the case), text, or a file with a name a line (default: the data set's own order, which of folders "
        "is text)",
    )
    add(
        "--val-fraction",
        type=float,
        default=argparse.SUPPRESS,
        metavar="F",
        help="share of each class that training held out of such a folder (default: the run's, or "
        f"{TrainConfig.val_fraction})",
    )
    add(
        "--seed",
        type=int,
        default=argparse.SUPPRESS,
        metavar="N",
        help="of that choice in training (default: the run's, or 0)",
    )
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
        help="folder for the figures as JSON and CSV, every prediction, and pictures of what was taken for what; those "
        "of an earlier evaluation are replaced (default: nothing is written)",
    )
    add_detection_flags(parser)
    add_tiling_flags(parser)
    return parser


def _evaluate(args: argparse.Namespace) -> int:
    if args.output:
        require("--output", "matplotlib")  # before the work whose figures it draws
    from train.inference.model import Classifier
    from train.tasks.begin import task_of

    if args.patch_size == _ALL and args.budget_ms is None:
        return _evaluate_patch_sizes(args)
    model = load_model(args)
    tiling = tiling_of(args, task_of(model.task.model_config))
    if isinstance(model, Classifier):
        return _evaluate_classifier(args, model)
    return _evaluate_dense(args, model, tiling)


def _evaluate_classifier(args: argparse.Namespace, classifier: "Classifier") -> int:
    from train.inference.allocation import Allocating

    data, source, classifier = _matched_classes(args, classifier)
    config, scores = classifier.config, classifier.task.scores(source)

    def lines() -> Iterator[str]:
        values, details = scores.values(), scores.details()
        for metric in classifier.task.metrics:
            yield f"{metric.label:13} {values[metric.name]:.2f}{' %' if metric.unit == '%' else ''}"
        yield f"loss          {values['loss']:.4f}"
        for name, label in (("precision", "precision"), ("recall", "recall"), ("f1", "F1")):
            macro, weighted = details[f"{name}_macro"], details[f"{name}_weighted"]
            yield f"{label:13} {macro:.2f} % (mean of the classes), {weighted:.2f} % (weighted by their images)"
        yield f"calibration   {details['calibration_error']:.2f} % expected error of the probabilities"
        if isinstance(classifier, Allocating):
            yield f"allocated     {_allocated(classifier)}"

    about = {
        "model": config.name,
        "image_size": config.image_size,
        "patch_size": AUTO if isinstance(classifier, Allocating) else config.patch_size,
        "reduce_tokens": config.reduce_tokens,
        "crop_pct": config.crop_pct,
        "exif": classifier.task.config.exif,
        "precision": classifier.precision,
        "quantize": args.quantize,
    }
    return _measure(args, classifier, data, source, scores, _about(args, classifier, data), lines, about)


def _measure(
    args: argparse.Namespace,
    model: "Predictor",
    data: "Data",
    source: "Source",
    scores: "Scores",
    headline: str,
    lines: Callable[[], Iterable[str]],
    about: Mapping[str, Any],
    tiling: "Tiling | None" = None,
) -> int:
    """Runs a model on all images, prints what came of it, and writes that where it is asked for.

    Args:
        lines: asked for the result, when all images are done.
        about: what is written of the model beside the figures.
    """
    from train.data.bad_images import BadImages
    from train.data.sources import image_names
    from train.data.tagged_images import TaggedImages
    from train.inference.evaluation import evaluate
    from train.inference.tiles import evaluate_in_windows
    from train.run.progress import open_bar

    output = Path(args.output) if args.output else None
    if output:
        scores.check_place(output)
        output.mkdir(parents=True, exist_ok=True)
    print(safe(headline, lines=True), flush=True)
    with open_bar(total=len(source), unit=" images") as bar:
        bad_images = BadImages(source, lambda line: bar.write(f"{_PROGRAM}: {line}", file=sys.stderr))
        tagged = TaggedImages()
        how = {**_batches(args, model, source, tiling), "tagged": tagged, "advance": bar.update}
        given = (model, source, scores, bad_images)
        images_per_s = evaluate_in_windows(*given, tiling, **how) if tiling else evaluate(*given, **how)
    tell_notes(_PROGRAM, exif_notes(args, model, tagged))
    for line in lines():
        print(line)
    print(f"images        {scores.values()['images']} (unreadable: {bad_images.count})")
    print(f"speed         {images_per_s:.3g} images/s")
    if output:
        about = {"weights": args.weights, "dataset": data.dataset, "split": data.split, **about}
        about |= {"bad_images": bad_images.count, "images_per_s": images_per_s}
        written = scores.write(output, about=about, images=image_names(source))
        print(f"written       {', '.join(written)} in {output}")
    return 0


def _allocated(classifier: "Allocating") -> str:
    """How many images each patch size had, and what one took on average."""
    from train.cost.flops import macs_per_image

    members = [(classifier.taken[place], member.config) for place, member in enumerate(classifier.members)]
    shares = [f"{','.join(map(str, config.patch_size))}: {count}" for count, config in members]
    macs = sum(count * macs_per_image(config) for count, config in members) / max(1, classifier.taken.total())
    return f"images by patch size {', '.join(shares)}; {macs / 1e9:.3f} GMAC each on average"


def _matched_classes(args: argparse.Namespace, classifier: "Classifier") -> "tuple[Data, Source, Classifier]":
    """The data set asked for, its images with labels in the order of the outputs, and the classifier with the names of
    its outputs; what the user should know of them is told."""
    from train.data.sources import Matched
    from train.inference.dataset import open_data
    from train.run.folder import run_behind
    from train.tasks.classification import match_classes

    given = {name: getattr(args, name) for name in _DATA if hasattr(args, name)}
    data = open_data(given, args.split, run_behind(args.weights))
    count = classifier.config.num_classes
    known, order_notes = _names_of_outputs(args.class_order, data, classifier.class_names, count)
    classes, match_notes = match_classes(data.class_names, known, count)
    class_notes = [*order_notes, *match_notes] if known else order_notes or match_notes
    tell_notes(_PROGRAM, [*data.notes, *classifier.notes, *class_notes])
    task = dataclasses.replace(classifier.task, class_names=known or data.class_names)
    return data, Matched(data.images, tuple(classes.tolist())), dataclasses.replace(classifier, task=task)


def _about(args: argparse.Namespace, classifier: "Classifier", data: "Data") -> str:
    """What is evaluated on what, in two lines."""
    config = classifier.config
    height, width = config.image_size
    return (
        f"CrossViT {config.name} at {height} x {width} pixels (crop {config.crop_pct:g}), "
        f"{config.num_classes} classes, {classifier.precision}"
        f"{f', {config.reduce_tokens}' * (config.reduce_tokens is not None)}"
        f"{f', weights rounded to {args.quantize}' * (args.quantize is not None)}, {classifier.device_summary}\n"
        f"{data.dataset}: {len(data.images)} images ({data.split})"
    )


def _batches(
    args: argparse.Namespace, model: "Predictor", source: "Source", tiling: "Tiling | None" = None
) -> dict[str, int]:
    """How the images are read."""
    workers = reading_processes(len(source)) if args.workers is None else args.workers
    images = None if tiling else len(source)  # which come in several windows each
    return {"batch_size": model.batch_size(args.batch_size, images), "workers": workers}


def _evaluate_patch_sizes(args: argparse.Namespace) -> int:
    """Prints a line for each patch size, those of the least work first."""
    from train.cost.flops import macs_per_image
    from train.data.bad_images import BadImages
    from train.data.tagged_images import TaggedImages
    from train.inference.allocation import compared_patch_sizes
    from train.inference.evaluation import evaluate
    from train.inference.model import require_classifier
    from train.run.progress import open_bar

    if args.output:
        raise SettingsError("--patch-size all prints a table: --output is for one patch size")
    stored = load_model(_at(args, None))
    require_classifier(args.weights, stored.task.model_config)
    if stored.config.multi_conv:
        raise SettingsError(f"{args.weights} has no other patch size: three convolutions embed the patches")
    data, source, stored = _matched_classes(args, stored)
    if stored.patch_sizes is None:
        tell_notes(_PROGRAM, ["weights lose accuracy at patch sizes that they were not trained with"])
    print(safe(_about(args, stored, data), lines=True))
    print(f"{'patch size':16}{'GMAC':>8}{'images/s':>10}{'top-1':>10}", flush=True)
    seen: set[str] = set()

    def tell_once(write: Callable[..., None], line: str) -> None:
        if line not in seen:
            seen.add(line)
            write(f"{_PROGRAM}: {line}", file=sys.stderr)

    for size in compared_patch_sizes(stored.config, stored.patch_sizes):
        is_stored = size == stored.config.patch_size
        classifier = stored if is_stored else load_model(_at(args, size))
        classifier = dataclasses.replace(
            classifier, task=dataclasses.replace(classifier.task, class_names=stored.task.class_names)
        )
        scores, tagged = classifier.task.scores(source), TaggedImages()
        with open_bar(total=len(source), unit=" images") as bar:
            tell = functools.partial(tell_once, bar.write)
            how = {**_batches(args, classifier, source), "advance": bar.update, "tagged": tagged}
            images_per_s = evaluate(classifier, source, scores, BadImages(source, tell), **how)
            for note in exif_notes(args, classifier, tagged):
                tell(f"note: {note}")
        name = ",".join(map(str, size)) + " (stored)" * is_stored
        gmacs, top1 = macs_per_image(classifier.config) / 1e9, scores.values()["top1"]
        print(f"{name:16}{gmacs:8.3f}{images_per_s:10.0f}{top1:8.2f} %", flush=True)
    return 0


def _at(args: argparse.Namespace, size: tuple[int, ...] | None) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(args), "patch_size": size})


def _evaluate_dense(args: argparse.Namespace, model: "Predictor", tiling: "Tiling | None") -> int:
    from train.inference.dataset import open_data
    from train.run.folder import run_behind
    from train.tasks.begin import matched, task_of

    if args.class_order is not None:
        raise SettingsError("--class-order is for classifiers")
    kind = task_of(model.task.model_config)
    given = {name: getattr(args, name) for name in _DATA if hasattr(args, name)}
    data = open_data(given | {"exif": model.task.config.exif}, args.split, run_behind(args.weights), kind)
    task, source, notes = matched(model.task, model.class_names, data.sets, data.images)
    tell_notes(_PROGRAM, [*data.notes, *model.notes, *notes])
    model, scores = dataclasses.replace(model, task=task), task.scores(source)
    cut = f", in windows of {tiling.side} pixels that overlap by {tiling.overlap:.0%}" if tiling else ""
    headline = (
        f"{task.headline()}{cut}, {model.precision}, {model.device_summary}\n"
        f"{data.dataset}: {len(source)} images ({data.split})"
    )

    def lines() -> Iterator[str]:
        yield from scores.lines()
        values = scores.values()
        labels = [(metric.name, metric.label) for metric in task.metrics]
        for name, label in (*labels, ("loss", "loss")):
            if name in values:
                yield f"{label:13} {values[name]:.4f}"

    about = {
        "model": task.model_config.name,
        "image_size": task.model_config.image_size,
        "exif": task.config.exif,
        "precision": model.precision,
        "tile": tiling and tiling.side,
        "overlap": tiling and tiling.overlap,
    }
    return _measure(args, model, data, source, scores, headline, lines, about, tiling)


# --- what the outputs are for ---


def _names_of_outputs(
    order: str | None, data: "Data", weight_names: tuple[str, ...] | None, num_classes: int
) -> tuple[tuple[str, ...] | None, list[str]]:
    """The class that each output is for, where that is known or asked for; and what the user should know of that.

    Args:
        order: `natural`, `text`, or a file of names.

    Raises SettingsError if the weights know other names than the file or have another number of classes, and
    ConversionError if it cannot be used.
    """
    if order in (NATURAL, TEXT):
        if weight_names is not None:
            return weight_names, [f"the weights know their classes: they are matched by name, not in {order} order"]
        return in_order(data.class_names, order), [f"output i is taken for the data set's class i in {order} order"]
    if order is not None:
        names = read_names(order)
        if weight_names not in (None, names):
            raise SettingsError(f"the weights know other class names than {order}: leave out --class-order")
        if len(names) != num_classes:
            raise SettingsError(f"{order} names {len(names)} classes, and the weights have {num_classes}")
        return names, []
    unlike = unlike_timm(data.class_names) if weight_names is None and data.sorted_by_name else None
    if unlike is None:
        return weight_names, []
    return None, [
        "the weights know no class names: output i is taken for the data set's class i as text is sorted; "
        f"{unlike}: --class-order natural takes that"
    ]


if __name__ == "__main__":
    leave(main())
