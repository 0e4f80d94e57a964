"""The images of a run that cannot be read: each is told once, and too many of them stop the run."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Int

from convert.errors import UserError, listed
from crossvit_jax.preprocess import Exif, UnreadableImage
from train.data.sources import Source
from train.devices.decoding import decoding_memory


class TooManyBadImages(UserError):
    """So many images cannot be read that the data set itself must be wrong; the message is one line that names them."""

    status = 1


class BadImages:
    """Collects the unreadable images of one data set from its batches.

    Args:
        source: where the batches come from, to look again at what is wrong with an image.
        say: told one line for each such image, when it is first met.
        exif: what the run does with EXIF orientations, which decide whether a picture has the size of its boxes.
    """

    def __init__(self, source: Source, say: Callable[[str], None], exif: Exif = "keep"):
        self.names: list[str] = []
        self._source, self._say, self._exif = source, say, exif
        self._seen: set[int] = set()

    @property
    def count(self) -> int:
        """Different images that could not be read."""
        return len(self.names)

    def add(self, indices: Int[np.ndarray, " batch"]) -> None:
        """What a batch has as `bad`: indices in the source, or -1. Raises DataError if the data set has gone."""
        for index in sorted(set(indices[indices >= 0].tolist()) - self._seen):
            self._seen.add(index)
            name, line = self._look_again(index)
            self.names.append(name)
            self._say(line)

    def _look_again(self, index: int) -> tuple[str, str]:
        # late: a machine that only computes may lack the packages that read images
        from train.images.dense import decoded

        try:
            sample = self._source[index]
            decoded(sample, self._exif)
        except UnreadableImage as error:
            return error.name, str(error)
        return sample["name"], f"could not read image {sample['name']}, which can be read now"


def unreadable(
    source: Source, places: Int[np.ndarray, " images"], exif: Exif = "keep"
) -> Int[np.ndarray, " unreadable"]:
    """Which of the images at some places cannot be read or decoded. Raises DataError if the data set has gone."""
    from train.images.dense import decoded  # late, as above

    def is_whole(place: int) -> bool:
        try:
            with decoding_memory().returned():
                decoded(source[place], exif)
        except UnreadableImage:
            return False
        return True

    with ThreadPoolExecutor() as pool:
        whole = list(pool.map(is_whole, places.tolist()))
    return places[~np.array(whole, bool)]


def too_many_error(bad_images: BadImages, count: int, images: int, share: float) -> TooManyBadImages:
    """The error for a run with more unreadable images than are accepted.

    Args:
        bad_images: those that this process has met, whose names are told.
        count: how many there are, in all processes.
        images: how many there could be.
        share: of them, how many are accepted.
    """
    return TooManyBadImages(
        f"{count} of {images} images cannot be read, more than the share of {share:g} that is accepted "
        f"(--max-bad-images): {listed(bad_images.names, count)}"
    )
