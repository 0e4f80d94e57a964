"""`python -m train.predict --weights SOURCE PATH...`: the most probable classes of images, or what is found in them."""

# What takes long to import is imported when it is needed: `--help` and wrong flags are answered at once.
import argparse
import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from convert.command_line import Parser, Program, at_least_one, leave, run
from convert.errors import SettingsError, listed, require
from convert.files import check_place, check_replaceable, home_path, local_path, write_whole
from convert.image_files import LeftOut
from convert.streams import reconfigure, tell_error
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
from train.inference.predictions import FORMATS

if TYPE_CHECKING:
    from train.images.tiles import Tiling
    from train.inference.model import Classifier, Predictor

_PROGRAM = Program("train.predict")
_FOLDERS = ("attention", "overlay", "masks")  # flags that name folders for pictures

_EPILOG = f"""\
{SOURCES}

PATH: an image file, a folder (with all folders below it), or - for a list on standard input, one path per line

exit status: 0 all images were read; 1 some could not be read, which stderr names; 2 nothing could be done, and
one line on stderr says why

examples:
  python -m train.predict --weights runs/X photo.jpg photos/ --format csv
  find photos -name '*.jpg' | python -m train.predict --weights SOURCE - --attention maps/
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Predict as the arguments say; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.attention and args.patch_size == AUTO and args.budget_ms is None:
        parser.error(f"--attention draws maps of one size: give a --patch-size, or --budget-ms with {AUTO}")
    if args.attention and args.quantize:  # qwix quantises what a call of the model computes, and nothing else of it
        parser.error("--attention draws what weights as they are attend to: leave out --quantize")
    return run(_PROGRAM, lambda: _predict(args), remedy=SMALLER_BATCH)


def _parser() -> Parser:
    parser = Parser(
        prog=_PROGRAM,
        description="Classify images with a CrossViT, in the order in which they are given; or find what is "
        "in them, with the weights of a detector or segmenter.",
        epilog=_EPILOG,
    )
    parser.add_argument("paths", type=local_path, metavar="PATH", nargs="+")
    add_model_flags(parser)
    add_patch_size_flags(parser)
    parser.add_argument(
        "--top-k", type=at_least_one, metavar="K", help="of a classifier: classes per image (default: 5)"
    )
    parser.add_argument("--format", choices=FORMATS, default="table", help="default: table")
    parser.add_argument(
        "--attention",
        type=home_path,
        metavar="OUT",
        help="folder for pictures of what the class tokens attend to, one per image, in folders like the images' own; "
        "those of an earlier prediction are replaced, no other file is; of a classifier, not with --quantize",
    )
    parser.add_argument(
        "--overlay",
        type=home_path,
        metavar="OUT",
        help="folder for the images with what a detector or segmenter finds in them, likewise",
    )
    parser.add_argument(
        "--masks",
        type=home_path,
        metavar="OUT",
        help="folder for a PNG of each image whose values are the classes of a segmenter, with a palette, likewise",
    )
    add_detection_flags(parser)
    add_tiling_flags(parser)
    parser.add_argument(
        "--classes",
        nargs="+",
        metavar="NAME",
        help="of a detector: the objects wanted; PATH stands before it (default: all)",
    )
    parser.add_argument(
        "--coco",
        type=home_path,
        metavar="FILE",
        help="of a detector: write all boxes as COCO's results (JSON), images numbered from 1 in their order; a file "
        "that is there is not replaced",
    )
    return parser


def _predict(args: argparse.Namespace) -> int:
    if args.attention:
        require("--attention", "matplotlib")
    from train.inference.image_paths import image_paths

    left_out = LeftOut()
    paths = image_paths(args.paths, left_out)
    folders = {name: Path(getattr(args, name)) for name in _FOLDERS if getattr(args, name)}
    places = {name: _place_pictures(folder, paths) for name, folder in folders.items()}
    if len(places) > 1:
        written = [os.path.realpath(path) for pictures in places.values() for path in pictures]
        if len(set(written)) < len(written):
            raise SettingsError(
                f"--{' and --'.join(folders)} name the same folder, and their files have the same names"
            )
    model = load_model(args)

    from train.inference.model import Classifier
    from train.tasks.begin import task_of

    learned = task_of(model.task.model_config)
    own = {"classification": {"top_k", "attention"}, "detection": {"overlay", "classes", "coco"}}
    own["segmentation"] = {"overlay", "masks"}
    others = sorted(set.union(*own.values()) - own[learned])
    given = [name for name in others if getattr(args, name) is not None]
    if given:
        raise SettingsError(f"--{given[0].replace('_', '-')} is not for {learned}, which {args.weights} is for")
    if args.attention is not None:
        try:
            model.task.model_config.require_all_tokens("--attention")
        except ValueError as error:
            raise SettingsError(str(error)) from None
    tiling = tiling_of(args, learned)
    if args.classes is not None:
        wanted = _class_numbers(args.classes, model.task.class_names)
        model = dataclasses.replace(model, task=dataclasses.replace(model.task, wanted=wanted))
    if args.coco is not None and os.path.lexists(args.coco):
        raise SettingsError(f"{args.coco} exists, and --coco does not replace it: name another file")
    coco = None if args.coco is None else check_place(Path(args.coco))
    inner = {path.parent for pictures in places.values() for path in pictures}
    for folder in (*folders.values(), *sorted(inner)):  # nothing can be wrong any more
        folder.mkdir(parents=True, exist_ok=True)
    tell_notes(_PROGRAM, [*left_out.notes(), *model.notes])
    if isinstance(model, Classifier):
        return _predict_classes(args, model, paths, places.get("attention"))
    return _find(args, model, paths, places, coco=coco, tiling=tiling)


def _predict_classes(
    args: argparse.Namespace, classifier: "Classifier", paths: Sequence[str], pictures: Sequence[Path] | None
) -> int:
    from train.data.bad_images import BadImages
    from train.data.tagged_images import TaggedImages
    from train.inference.classify import classify
    from train.inference.image_paths import FileSource
    from train.run.progress import open_bar

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
        how = {"batch_size": batch_size, "workers": workers, "top_k": args.top_k or 5, "pictures": pictures}
        batches = classify(classifier, source, bad_images, **how, tagged=tagged)
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


def _find(
    args: argparse.Namespace,
    model: "Predictor",
    paths: Sequence[str],
    places: Mapping[str, Sequence[Path]],
    *,
    coco: Path | None,
    tiling: "Tiling | None",
) -> int:
    from train.data.bad_images import BadImages
    from train.data.tagged_images import TaggedImages
    from train.inference.dense import find
    from train.inference.findings import FORMATS, coco_file
    from train.inference.image_paths import FileSource
    from train.run.progress import open_bar
    from train.tasks.begin import task_of

    text = FORMATS[args.format](paths, model.task.class_names, boxes=task_of(model.task.model_config) == "detection")
    reconfigure(sys.stdout, encoding="utf-8", errors="surrogateescape")
    source, results = FileSource(tuple(paths)), []
    with open_bar(total=len(paths), unit=" images") as bar:

        def say(line: str) -> None:
            bar.write(f"{_PROGRAM}: {line}", file=sys.stderr)

        bad_images, tagged = BadImages(source, say), TaggedImages()
        bar.write(text.header, end="")
        batch_size = model.batch_size(args.batch_size, None if tiling else len(paths))
        how = {"batch_size": batch_size, "workers": reading_processes(len(paths))}
        how |= {"pictures": places.get("overlay"), "masks": places.get("masks"), "tagged": tagged, "tiling": tiling}
        with closing(find(model, source, bad_images, **how, advance=bar.update)) as answers:
            for found in answers:
                bar.write(text.entry(found), end="")
                sys.stdout.flush()
                results += [found] if coco else []
    tell_notes(_PROGRAM, exif_notes(args, model, tagged))
    if coco:
        write_whole(coco, coco_file(results, paths))
        tell_error(f"{_PROGRAM}: {sum(len(found.boxes) for found in results)} boxes written to {coco}")
    if bad_images.count:
        tell_error(f"{_PROGRAM}: {bad_images.count} of {len(paths)} images could not be read")
    return 1 if bad_images.count else 0


def _class_numbers(wanted: Sequence[str], names: Sequence[str]) -> tuple[int, ...]:
    """Raises SettingsError for a name that no class has."""
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise SettingsError(f"--classes: no class {unknown[0]!r}; there are {listed(names[:20], len(names))}")
    return tuple(place for place, name in enumerate(names) if name in wanted)


def _place_pictures(folder: Path, images: Sequence[str]) -> list[Path]:
    """Where the pictures of images go, in a folder. Raises ConversionError rather than replace a file that is not a
    picture of ours, or that is one of the images."""
    from train.pictures.attention import picture_paths
    from train.pictures.figure import is_own_picture

    pictures = picture_paths(folder, images)
    check_replaceable(pictures, is_own_picture, inputs=images)
    return pictures


if __name__ == "__main__":
    leave(main())
