"""`python -m train.predict --weights SOURCE PATH...`: the most probable classes of images."""

# What takes long to import is imported when it is needed: `--help` and wrong flags are answered at once.
import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from convert.command_line import Parser, at_least_one, leave, run
from convert.files import home_path
from train.inference.command import (
    SMALLER_BATCH,
    SOURCES,
    add_model_flags,
    load_model,
    progress_bar,
    reading_processes,
    tell_notes,
)
from train.inference.predictions import FORMATS, Prediction

if TYPE_CHECKING:
    from train.data.bad_images import BadImages
    from train.inference.image_paths import FileSource
    from train.inference.model import Classifier

_PROGRAM = "python -m train.predict"

_EPILOG = f"""\
{SOURCES}

PATH: an image file, a folder (with all folders below it), or - for a list on standard input, one path per line

exit status: 0 all images were classified; 1 some could not be read, which stderr names; 2 nothing could be done, and
one line on stderr says why
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Predict as the arguments say; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.attention and args.quantize:  # qwix quantises what a call of the model computes, and nothing else of it
        parser.error("--attention draws what weights as they are attend to: leave out --quantize")
    return run(_PROGRAM, lambda: _predict(args), remedy=SMALLER_BATCH)


def _parser() -> Parser:
    parser = Parser(
        prog=_PROGRAM,
        description="Classify images with a CrossViT, in the order in which they are given.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("paths", metavar="PATH", nargs="+")
    add_model_flags(parser)
    parser.add_argument("--top-k", type=at_least_one, default=5, metavar="K", help="classes per image (default: 5)")
    parser.add_argument("--format", choices=FORMATS, default="table", help="default: table")
    parser.add_argument(
        "--attention",
        type=home_path,
        metavar="OUT",
        help="folder for pictures of what the class tokens attend to, one per image; not with --quantize",
    )
    return parser


def _predict(args: argparse.Namespace) -> int:
    from train.inference.image_paths import FileSource, image_paths

    paths = image_paths(args.paths)
    pictures = Path(args.attention) if args.attention else None
    if pictures:
        pictures.mkdir(parents=True, exist_ok=True)

    from train.data.bad_images import BadImages

    classifier = load_model(args)
    tell_notes(_PROGRAM, classifier.notes)
    text = FORMATS[args.format](paths, classifier.task.class_names)
    # a path that is no text is written as the bytes it is, so that other programs find the file
    sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")

    source = FileSource(tuple(paths))
    with progress_bar(len(paths)) as bar:
        bad_images = BadImages(source, lambda reason: bar.write(f"{_PROGRAM}: {reason}", file=sys.stderr))
        bar.write(text.header, end="")
        batch_size = classifier.batch_size(args.batch_size, len(paths))
        batches = classify(classifier, source, bad_images, batch_size=batch_size, top_k=args.top_k, pictures=pictures)
        with closing(batches):
            for results in batches:
                entries = (text.entry(*result) for result in results)
                bar.write("".join(entries), end="")
                sys.stdout.flush()
                bar.update(min(batch_size, len(paths) - bar.n))
    if bad_images.count:
        print(f"{_PROGRAM}: {bad_images.count} of {len(paths)} images could not be read", file=sys.stderr)
    return 1 if bad_images.count else 0


class Result(NamedTuple):
    """What is known of one image."""

    path: str
    predictions: Sequence[Prediction]  # the best first
    picture: str | None = None  # where its attention is drawn


def classify(
    classifier: "Classifier",
    source: "FileSource",
    bad_images: "BadImages",
    *,
    batch_size: int,
    top_k: int,
    pictures: Path | None = None,
) -> Iterator[list[Result]]:
    """The results of image files, in their order, batch by batch as they are ready.

    Args:
        bad_images: told which images cannot be read, and are left out.
        batch_size: a multiple of the number of devices.
        top_k: predictions per image; where there are fewer classes, all of them.
        pictures: folder in which to draw what the class tokens attend to.

    Raises NotWritten if a picture cannot be written.
    """
    import jax
    import numpy as np

    from convert.files import shown
    from train.data.batches import eval_batches
    from train.data.streams import device_batches
    from train.inference.evaluation import forward
    from train.pictures.attention import PictureNames, class_token_attention, draw_attention

    task = classifier.task

    def program(model: Any, batch: Any) -> Any:
        attention = class_token_attention(model, batch["image"]) if pictures else {}
        return {"probability": jax.nn.softmax(model(batch["image"])), "attention": attention}

    def result(path: str, image: Any, outputs: Any) -> Result:
        best = np.argsort(-outputs["probability"], kind="stable")[:top_k].tolist()
        predictions = [
            Prediction(task.class_names[index], index, float(outputs["probability"][index])) for index in best
        ]
        if picture_names is None:
            return Result(path, predictions)
        picture = picture_names.name(path)
        draw_attention(
            picture,
            classifier.config,
            title=shown(path),
            image=image,
            attention=outputs["attention"],
            predictions=[(p.class_name, p.probability) for p in predictions],
        )
        return Result(path, predictions, str(picture))

    picture_names = PictureNames(pictures) if pictures else None
    transform, workers = task.transform(training=False), reading_processes(len(source))
    batches = eval_batches(source, transform, batch_size=batch_size, workers=workers, rounds=1)
    shapes = {"image": task.batch_shapes(batch_size, training=False)["image"]}
    with closing(device_batches(batches, classifier.mesh)) as stream:
        compiled = classifier.compile(program, shapes)  # while the first images are read
        paths = iter(source.paths)
        for batch, outputs in forward(lambda batch: compiled({"image": batch["image"]}), stream):
            bad_images.add(batch["bad_indices"])
            readable = np.asarray(batch["mask"]) > 0
            images = np.asarray(batch["image"]) if pictures else [None] * batch_size
            yield [
                result(path, images[i], jax.tree.map(lambda array, i=i: array[i], outputs))
                for i, path in enumerate(itertools.islice(paths, batch_size))
                if readable[i]
            ]


if __name__ == "__main__":
    leave(main())
