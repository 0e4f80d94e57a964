"""The command `python -m benchmarks.accuracy`: how large, how fast and how right several models are, as Markdown."""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from benchmarks.command import parser_of
from benchmarks.result import markdown_table, times_as_fast
from benchmarks.rounds import say
from convert.architecture import expected_shapes
from convert.command_line import at_least_one, at_least_zero, data_set, leave, run, weights_source
from convert.files import home_path
from train.cost.flops import macs_per_image
from train.data.bad_images import BadImages
from train.data.sources import Matched
from train.inference.command import reading_processes
from train.inference.dataset import Data, open_data
from train.inference.evaluation import evaluate
from train.inference.model import Classifier, load_classifier
from train.run.folder import run_behind
from train.tasks.classification import match_classes

_ROUND_S = 1.0  # a round of a model takes about as long
_EPILOG = """\
The models are timed in turn in one process, A B C A B C …, and compared with the first. Compilation is not timed.
GMAC are multiply-adds of one image; top-1 is that of the held-out images.

exit status: 0 done; 1 images cannot be read; 2 wrong flags, or weights that cannot be compared

example, a model, what is left of it, and what that became by training:
  python -m benchmarks.accuracy runs/full pruned.safetensors runs/recovered
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit status."""
    parser = parser_of("accuracy", "Compare classifiers: parameters, work, speed and accuracy.", _EPILOG)
    add = parser.add_argument
    add("weights", nargs="+", type=weights_source, metavar="SOURCE", help="of python -m convert; the first is compared")
    add("--dataset", type=data_set, metavar="DATA", help="default: that of the first run among the sources")
    add("--data-dir", type=home_path, metavar="DIR", help="where prepared data sets lie")
    add("--batch-size", type=at_least_one, default=8, metavar="N", help="images that are timed together; default: 8")
    add("--repeats", type=at_least_one, default=10, metavar="N", help="rounds; default: 10")
    add("--workers", type=at_least_zero, metavar="N", help="processes that read images; default: one per core")
    args = parser.parse_args(argv)
    return run(parser.prog, lambda: _compare(args), failure=1)


def _compare(args: argparse.Namespace) -> int:
    classifiers = {source: load_classifier(source) for source in args.weights}
    behind = next(filter(None, map(run_behind, args.weights)), None)
    given = {name: value for name in ("dataset", "data_dir") if (value := getattr(args, name)) is not None}
    data = open_data(given, "held-out", behind)
    top1 = {source: _top1(args, classifier, data) for source, classifier in classifiers.items()}
    seconds = _seconds(args, list(classifiers.values()))
    rows = []
    for (source, classifier), times in zip(classifiers.items(), seconds, strict=True):
        config = classifier.config
        ratio, least, most = times_as_fast(times, seconds[0])
        speed = f"{args.batch_size / statistics.median(times):.1f}"
        parameters = sum(map(math.prod, expected_shapes(config).values()))
        row = [f"`{source}`", f"{parameters:,}", f"{macs_per_image(config) / 1e9:.3f}", speed]
        rows.append([*row, f"{ratio:.2f} ({least:.2f} to {most:.2f})", f"{top1[source]:.2f} %"])
    first = next(iter(classifiers.values()))
    print(f"{data.dataset}: {len(data.images)} images ({data.split}), {first.precision}, {first.device_summary}\n")
    titles = ["weights", "parameters", "GMAC", f"images/s, batch {args.batch_size}", "times as fast", "top-1"]
    print("\n".join(markdown_table(titles, rows)), flush=True)
    return 0


def _top1(args: argparse.Namespace, classifier: Classifier, data: Data) -> float:
    classes, notes = match_classes(data.class_names, classifier.class_names, classifier.config.num_classes)
    for note in (*classifier.notes, *notes):
        say(f"note: {note}")
    source = Matched(data.images, tuple(classes.tolist()))
    scores = classifier.task.scores(source)
    workers = reading_processes(len(source)) if args.workers is None else args.workers
    how = {"batch_size": classifier.batch_size(None, len(source)), "workers": workers, "advance": lambda count: None}
    evaluate(classifier, source, scores, BadImages(source, say), **how)
    return scores.values()["top1"]


def _seconds(args: argparse.Namespace, classifiers: Sequence[Classifier]) -> list[list[float]]:
    """How long each model takes for a batch, round by round."""
    calls = [_call(classifier, args.batch_size) for classifier in classifiers]
    counts = [max(1, round(_ROUND_S / _time(call, 1))) for call in calls]
    seconds: list[list[float]] = [[] for _ in calls]
    for number in range(1, args.repeats + 1):
        for call, count, times in zip(calls, counts, seconds, strict=True):
            times.append(_time(call, count))
        say(f"round {number} of {args.repeats} done")
    return seconds


def _call(classifier: Classifier, batch_size: int) -> Callable[[], None]:
    """Runs a batch that is there, and waits for its logits; it has run once."""
    config = classifier.config
    images = np.random.default_rng(0).standard_normal((batch_size, *config.image_size, config.in_chans), np.float32)
    batch = jax.device_put({"image": images})
    shapes = {"image": jax.ShapeDtypeStruct(images.shape, images.dtype)}
    program = classifier.compile(lambda model, batch: model(batch["image"]), shapes)

    def call() -> None:
        jax.block_until_ready(program(batch))

    call()
    return call


def _time(call: Callable[[], None], count: int) -> float:
    """Seconds per call."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


if __name__ == "__main__":
    leave(main())
