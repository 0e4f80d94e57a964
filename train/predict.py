"""`python -m train.predict --weights SOURCE PATH...`: the most probable classes of images."""

# What takes long to import is imported when it is needed: `--help` and wrong flags are answered at once.
import argparse
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.command_line import Parser, at_least_one, leave
from train.config import home_path
from train.inference.command import SOURCES, add_model_flags, load_model, progress_bar, run, tell_notes

if TYPE_CHECKING:
    import numpy as np

    from train.inference.model import Classifier
    from train.inference.predictions import Prediction

_PROGRAM = "python -m train.predict"
_FORMATS = ("table", "csv", "jsonl")
_BATCHES_BEHIND = 2  # results are fetched so many batches late, so that the devices never wait for the host

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
    return run(_PROGRAM, lambda: _predict(args))


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
    parser.add_argument("--format", choices=_FORMATS, default="table", help="default: table")
    parser.add_argument(
        "--attention",
        type=home_path,
        metavar="OUT",
        help="folder for pictures of what the class tokens attend to, one per image; not with --quantize",
    )
    return parser


def _predict(args: argparse.Namespace) -> int:
    from train.inference.image_paths import image_paths

    paths = image_paths(args.paths)
    pictures = Path(args.attention) if args.attention else None
    if pictures:
        pictures.mkdir(parents=True, exist_ok=True)

    from train.inference.predictions import FORMATS

    classifier = load_model(args)
    tell_notes(_PROGRAM, classifier.notes)
    text = FORMATS[args.format](paths, classifier.names)
    # a path that is no text is written as the bytes it is, so that other programs find the file
    sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")

    failures = 0
    with progress_bar(len(paths)) as bar:

        def skip(reason: str) -> None:
            nonlocal failures
            failures += 1
            bar.write(f"{_PROGRAM}: {reason}", file=sys.stderr)
            bar.update()

        bar.write(text.header, end="")
        batch_size = classifier.batch_size(args.batch_size, len(paths))
        for results in classify(
            classifier, paths, batch_size=batch_size, top_k=args.top_k, pictures=pictures, skip=skip
        ):
            entries = (text.entry(result.path, result.predictions, result.picture) for result in results)
            bar.write("".join(entries), end="")
            sys.stdout.flush()
            bar.update(len(results))
    if failures:
        print(f"{_PROGRAM}: {failures} of {len(paths)} images could not be read", file=sys.stderr)
    return 1 if failures else 0


@dataclass(frozen=True)
class Result:
    """What is known of one image."""

    path: str
    predictions: "Sequence[Prediction]"  # the best first
    picture: str | None = None  # where its attention is drawn


def classify(
    classifier: "Classifier",
    paths: Sequence[str],
    *,
    batch_size: int,
    top_k: int,
    skip: Callable[[str], None],
    pictures: Path | None = None,
) -> Iterator[list[Result]]:
    """The results of image files, in their order, batch by batch as they are ready.

    Args:
        batch_size: a multiple of the number of devices.
        top_k: predictions per image; where there are fewer classes, all of them.
        skip: told in one line why an image is left out.
        pictures: folder in which to draw what the class tokens attend to.

    Raises OSError if a picture cannot be written.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from train.inference.predictions import Prediction
    from train.pictures.attention import PictureNames, class_token_attention, draw_attention

    config, class_names = classifier.config, classifier.names

    def forward(model: Any, batch: Any) -> Any:
        attention = class_token_attention(model, batch["image"]) if pictures else {}
        return {"probability": jax.nn.softmax(model(batch["image"])), "attention": attention}

    picture_names = PictureNames(pictures) if pictures else None

    def finish(names: list[str], images: np.ndarray, outputs: Any) -> list[Result]:
        outputs = jax.device_get(outputs)
        results = []
        for i, path in enumerate(names):
            one = jax.tree.map(lambda array, i=i: array[i], outputs)
            best = np.argsort(-one["probability"], kind="stable")[:top_k].tolist()
            predictions = [Prediction(class_names[index], index, float(one["probability"][index])) for index in best]
            picture = picture_names.name(path) if picture_names else None
            if picture:
                draw_attention(
                    picture,
                    config,
                    image_path=path,
                    image=images[i],
                    attention=one["attention"],
                    predictions=predictions,
                )
            results.append(Result(path, predictions, picture and str(picture)))
        return results

    shapes = {"image": jax.ShapeDtypeStruct((batch_size, *config.image_size, 3), jnp.float32)}
    pending: deque[tuple[list[str], np.ndarray, Any]] = deque()
    with ThreadPoolExecutor() as threads:
        compiling = threads.submit(classifier.compile, forward, shapes)  # while the first images are read
        for names, images in _read_batches(classifier, paths, batch_size=batch_size, threads=threads, skip=skip):
            pending.append((names, images, compiling.result()(classifier.put({"image": images}))))
            if len(pending) > _BATCHES_BEHIND:
                yield finish(*pending.popleft())
    while pending:
        yield finish(*pending.popleft())


def _read_batches(
    classifier: "Classifier",
    paths: Sequence[str],
    *,
    batch_size: int,
    threads: ThreadPoolExecutor,
    skip: Callable[[str], None],
) -> "Iterator[tuple[list[str], np.ndarray]]":
    """Paths of readable images and the images, normalised (batch, height, width, 3) float32, zeros at the end."""
    import numpy as np

    from train.images.decode import UnreadableImage
    from train.images.transforms import eval_transform
    from train.inference.image_paths import shown

    transform = eval_transform(classifier.config)

    def read(path: str) -> np.ndarray:
        try:
            encoded = Path(path).read_bytes()
        except OSError as error:
            raise UnreadableImage(shown(path), error.strerror or str(error)) from error
        return transform({"image": encoded, "label": 0, "name": shown(path)})["image"]

    def stack(images: list[np.ndarray]) -> np.ndarray:
        return np.pad(np.stack(images), [(0, batch_size - len(images))] + [(0, 0)] * 3)

    ahead = 2 * batch_size + (os.cpu_count() or 1)
    reading: deque[tuple[str, Future]] = deque()
    unread = iter(paths)
    names: list[str] = []
    images: list[np.ndarray] = []
    try:
        while True:
            for path in unread:
                reading.append((path, threads.submit(read, path)))
                if len(reading) >= ahead:
                    break
            if not reading:
                break
            path, image = reading.popleft()
            try:
                images.append(image.result())
                names.append(path)
            except UnreadableImage as error:
                skip(str(error))
            if len(images) == batch_size:
                yield names, stack(images)
                names, images = [], []
        if images:
            yield names, stack(images)
    finally:
        for _, image in reading:  # on the way out after an error or Ctrl-C, nobody needs them
            image.cancel()


if __name__ == "__main__":
    leave(main())
