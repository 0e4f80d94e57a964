"""`python -m train.predict --weights SOURCE PATH...`: the most probable classes of images."""

# What takes long to import is imported when it is needed: `--help` and wrong flags are answered at once.
import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from convert.command_line import Parser, at_least_one, leave, run
from convert.files import check_replaceable, home_path, local_path
from convert.image_files import LeftOut
from convert.streams import reconfigure, tell_error
from train.inference.command import (
    SMALLER_BATCH,
    SOURCES,
    add_model_flags,
    exif_notes,
    load_model,
    reading_processes,
    tell_notes,
)
from train.inference.predictions import FORMATS

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
    )
    parser.add_argument("paths", type=local_path, metavar="PATH", nargs="+")
    add_model_flags(parser)
    parser.add_argument("--top-k", type=at_least_one, default=5, metavar="K", help="classes per image (default: 5)")
    parser.add_argument("--format", choices=FORMATS, default="table", help="default: table")
    parser.add_argument(
        "--attention",
        type=home_path,
        metavar="OUT",
        help="folder for pictures of what the class tokens attend to, one per image; those of an earlier prediction "
        "are replaced, no other file is; not with --quantize",
    )
    return parser


def _predict(args: argparse.Namespace) -> int:
    from train.inference.image_paths import FileSource, image_paths

    left_out = LeftOut()
    paths = image_paths(args.paths, left_out)
    pictures = _place_pictures(Path(args.attention), paths) if args.attention else None

    from train.data.bad_images import BadImages
    from train.data.tagged_images import TaggedImages
    from train.inference.classify import classify
    from train.run.progress import open_bar

    classifier = load_model(args)
    tell_notes(_PROGRAM, [*left_out.notes(), *classifier.notes])
    text = FORMATS[args.format](paths, classifier.task.class_names)
    # a path that is no text is written as the bytes it is, so that other programs find the file
    reconfigure(sys.stdout, encoding="utf-8", errors="surrogateescape")

    source = FileSource(tuple(paths))
    with open_bar(total=len(paths), unit=" images") as bar:

        def say(line: str) -> None:
            bar.write(f"{_PROGRAM}: {line}", file=sys.stderr)

        bad_images, tagged = BadImages(source, say), TaggedImages()
        bar.write(text.header, end="")
        batch_size = classifier.batch_size(args.batch_size, len(paths))
        workers = reading_processes(len(paths))
        how = {"batch_size": batch_size, "workers": workers, "top_k": args.top_k, "pictures": pictures}
        batches = classify(classifier, source, bad_images, **how, say=say, tagged=tagged)
        with closing(batches):
            for results in batches:
                entries = (text.entry(*result) for result in results)
                bar.write("".join(entries), end="")
                sys.stdout.flush()
                bar.update(min(batch_size, len(paths) - bar.n))
    tell_notes(_PROGRAM, exif_notes(args, classifier, tagged))
    if bad_images.count:
        tell_error(f"{_PROGRAM}: {bad_images.count} of {len(paths)} images could not be read")
    return 1 if bad_images.count else 0


def _place_pictures(folder: Path, images: Sequence[str]) -> list[Path]:
    """Where the pictures of images go, in a folder that is made. Raises ConversionError rather than replace a file that
    is not a picture of ours, or that is one of the images."""
    from train.pictures.attention import picture_paths
    from train.pictures.figure import is_own_picture

    pictures = picture_paths(folder, images)
    check_replaceable(pictures, is_own_picture, inputs=images)
    folder.mkdir(parents=True, exist_ok=True)
    return pictures


if __name__ == "__main__":
    leave(main())
