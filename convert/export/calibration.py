"""Real images to find the ranges of static quantisation on, to compare on, or to prune by: a folder's, or digits."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from convert.digits import held_out_indices, load_digits
from convert.errors import ConversionError
from convert.export.compare import Images
from convert.files import FOLDER_PREFIX, typed_path
from convert.image_files import IMAGE_SUFFIXES, USUAL_SHARE, LeftOut, accepted_unreadable, image_files
from crossvit_jax.config import CrossViTConfig
from crossvit_jax.preprocess import Exif, UnreadableImage, preprocess_image

DIGITS = "digits"
CALIBRATED_ON = 128  # images, where nothing else is asked for
FEW = 32  # with fewer images than this, the ranges seen are a matter of chance


def find_images(source: str, left_out: LeftOut | None = None) -> list[Path] | None:
    """The image files below a folder, sorted; None for `digits`, which are no files. Reads none of them.

    A folder is PATH or, as for training, `folder:PATH`, and is searched by `convert.image_files`.

    Args:
        left_out: is told what is passed over.

    Raises:
        ConversionError: there is no such folder, it cannot be read, or no images are in it.
    """
    if source == DIGITS:
        return None
    folder = typed_path(source.removeprefix(FOLDER_PREFIX))
    if not folder.is_dir():
        raise ConversionError(f"{folder}: images come from {DIGITS!r} or a folder, and this is neither")
    try:
        paths = sorted(map(Path, image_files(folder, left_out=left_out)))
    except OSError as error:
        raise ConversionError(f"{error.filename} cannot be read: {error.strerror}") from None
    if not paths:
        raise ConversionError(f"{folder}: no images in it (looked for {' '.join(IMAGE_SUFFIXES)})")
    return paths


def calibration_images(
    source: str, config: CrossViTConfig, count: int, exif: Exif = "keep", left_out: LeftOut | None = None
) -> Images:
    """Up to `count` images as evaluation sees them, normalised.

    Of more, as many are taken at even steps through the sorted paths, so that each class folder has its share.

    Args:
        source: `digits`, or a folder.
        config: of the model that will see them: its image size and `crop_pct`.
        count: at least 1.
        exif: as in training, see `crossvit_jax.preprocess.decode_image`.
        left_out: is told what is passed over in a folder, also single images of many that cannot be read.

    Raises:
        ConversionError: see `find_images`; too many images cannot be read, or the model takes no colour images.
    """
    paths = find_images(source, left_out)
    pictures = _digits(count) if paths is None else _evenly(paths, count)
    return _prepared(pictures, config, exif, left_out)[0]


def training_images(
    source: str, config: CrossViTConfig, count: int, exif: Exif = "keep", left_out: LeftOut | None = None
) -> tuple[Images, list[tuple[str, ...]]]:
    """The same of what is trained on, and of each image the names that may be its class, the likeliest first.

    Of the digits these are the ones that no run holds out; of a folder with `train` in it, what is in there. The names
    are those of the digits, or of the folders on the way to a file, the outermost first.
    """
    if source == DIGITS:
        pixels, labels = load_digits()
        training = np.setdiff1d(np.arange(len(labels)), held_out_indices(labels))[:count]
        names = [(str(labels[index]),) for index in training]
        return _prepared(_drawn(pixels[training]), config, exif, left_out, names)
    folder = training_folder(source)
    paths = _evenly(find_images(str(folder), left_out), count)
    return _prepared(paths, config, exif, left_out, [path.relative_to(folder).parts[:-1] for path in paths])


def training_folder(source: str) -> Path:
    """Where the images of a folder are that are trained on."""
    folder = typed_path(source.removeprefix(FOLDER_PREFIX))
    return folder / "train" if (folder / "train").is_dir() else folder


def _evenly(paths: Sequence[Path], count: int) -> list[Path]:
    taken = min(count, len(paths))
    return [paths[i * len(paths) // taken] for i in range(taken)]


def _prepared(
    pictures: Sequence[Path | Image.Image],
    config: CrossViTConfig,
    exif: Exif,
    left_out: LeftOut | None,
    names: Sequence[tuple[str, ...]] | None = None,
) -> tuple[Images, list[tuple[str, ...]]]:
    """The pictures that can be read, as the model takes them, and the names that belong to these."""
    if config.in_chans != 3:
        raise ConversionError(f"these images have 3 channels, and the model takes {config.in_chans}")
    images, left = [], []
    left_out = LeftOut() if left_out is None else left_out
    for picture, name in zip(pictures, names or [()] * len(pictures), strict=True):
        try:
            images.append(preprocess_image(picture, config, exif=exif))
            left.append(name)
        except UnreadableImage as error:
            left_out.unreadable.append(error.name)
            if len(left_out.unreadable) > accepted_unreadable(USUAL_SHARE, len(pictures)):
                raise ConversionError(f"{error.name} cannot be read as an image: {error.reason}") from None
    return np.stack(images), left


def shortage(found: int, asked: int) -> str | None:
    """A sentence for the user where there are fewer images than asked for, or too few; None where all is well."""
    if found >= asked and found >= FEW:
        return None
    few = f"; with fewer than {FEW} the ranges of the activations are little more than guesses" if found < FEW else ""
    return f"calibrating on {found} image{'s' if found != 1 else ''}, {asked} were asked for{few}"


def _digits(count: int) -> list[Image.Image]:
    """The first `count` of the 1,797 digits, whose order is that of the writers, classes mixed."""
    return _drawn(load_digits()[0][:count])


def _drawn(pixels: UInt8[np.ndarray, "digits 8 8"]) -> list[Image.Image]:
    return [Image.fromarray(digit).convert("RGB") for digit in pixels]
