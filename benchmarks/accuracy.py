"""The command `python -m benchmarks.accuracy`: how large, how fast and how right several models are."""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.command import add_data, add_rounds, given_data, parser_of, run_benchmark
from benchmarks.result import Content, one_result
from benchmarks.rounds import in_turn, say
from benchmarks.task import jax_facts, repeated
from benchmarks.worker import ROUND_SECONDS, seconds_of
from convert.architecture import expected_shapes
from convert.command_line import at_least_one, leave, weights_source
from train.cost.flops import macs_per_image
from train.data.bad_images import BadImages
from train.data.sources import Matched
from train.inference.command import reading_processes
from train.inference.dataset import Data, open_data
from train.inference.evaluation import evaluate
from train.inference.model import Classifier, load_classifier
from train.run.folder import run_behind
from train.tasks.classification import match_classes

_EPILOG = """\
The models are timed in turn in one process, A B C A B C …, and compared with the first. Compilation is not timed.
GMAC are multiply-adds of one image; top-1 is that of the held-out images.

exit status: 0 done; 1 images cannot be read; 2 wrong flags, or weights that cannot be compared

example, a model, what is left of it, and what that became by training:
  python -m benchmarks.accuracy runs/full pruned.safetensors runs/recovered
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = parser_of("accuracy", "Compare classifiers: parameters, work, speed and accuracy.", _EPILOG)
    add = parser.add_argument
    add("weights", nargs="+", type=weights_source, metavar="SOURCE", help="of python -m convert; the first is compared")
    add_data(parser)
    add("--batch-size", type=at_least_one, default=8, metavar="N", help="images that are timed together; default: 8")
    add_rounds(parser)
    args = parser.parse_args(argv)
    return run_benchmark(parser, args, lambda: _measured(args))


def _measured(args: argparse.Namespace) -> Iterator[Content]:
    classifiers = {source: load_classifier(source) for source in args.weights}
    behind = next(filter(None, map(run_behind, args.weights)), None)
    data = open_data(given_data(args), "held-out", behind)
    figures = {source: _figures(classifier, data) for source, classifier in classifiers.items()}
    turns = {source: _turn(classifier, args.batch_size) for source, classifier in classifiers.items()}
    for source, seconds in in_turn(turns, args.repeats).items():
        figures[source]["seconds"] = seconds
    told = {"dataset": data.dataset, "images": len(data.images), "held_out_split": data.split}
    told |= {"reference": args.weights[0], "batch_size": args.batch_size, "images_per_call": args.batch_size}
    yield one_result("accuracy", told, figures, **jax_facts())


def _figures(classifier: Classifier, data: Data) -> dict[str, Any]:
    """What a model has and does, and its accuracy on the images."""
    config = classifier.config
    classes, notes = match_classes(data.class_names, classifier.class_names, config.num_classes)
    for note in (*classifier.notes, *notes):
        say(f"note: {note}")
    source = Matched(data.images, tuple(classes.tolist()))
    scores = classifier.task.scores(source)
    how = {"batch_size": classifier.batch_size(None, len(source)), "workers": reading_processes(len(source))}
    evaluate(classifier, source, scores, BadImages(source, say), advance=lambda count: None, **how)
    known = {"parameters": sum(map(math.prod, expected_shapes(config).values())), "macs": macs_per_image(config)}
    return known | {"top1": scores.values()["top1"], "precision": classifier.precision}


def _turn(classifier: Classifier, batch_size: int) -> Callable[[], float]:
    """Seconds of a call with a batch that is there, over a round of calls; the program has run before."""
    config = classifier.config
    images = np.random.default_rng(0).standard_normal((batch_size, *config.image_size, config.in_chans), np.float32)
    batch = jax.device_put({"image": images})
    shapes = {"image": jax.ShapeDtypeStruct(images.shape, images.dtype)}
    compiled = classifier.compile(lambda model, batch: model(batch["image"]), shapes)
    program = repeated(lambda: jax.block_until_ready(compiled(batch)))
    program(1)
    calls = max(1, round(ROUND_SECONDS / seconds_of(program, 1)))
    return lambda: seconds_of(program, calls) / calls


if __name__ == "__main__":
    leave(main())
