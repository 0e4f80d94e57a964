"""The images with an EXIF orientation that would turn them: they are counted, and told once."""

import numpy as np
from jaxtyping import Int

from crossvit_jax.preprocess import Exif


class TaggedImages:
    """Counts them in batches."""

    def __init__(self):
        self.count = self._images = 0

    def add(self, tagged: Int[np.ndarray, " batch"]) -> None:
        """What a batch has as `tagged`: 1, 0, or -1 for no image."""
        self.count += int((tagged == 1).sum())
        self._images += int((tagged >= 0).sum())

    def told(self, exif: Exif, kind: str = "", *, why: str = "as timm does") -> str | None:
        """A sentence on them for the user; None where there are none.

        Args:
            exif: what is done with them.
            kind: of the images.
            why: they are kept as they are.
        """
        if not self.count:
            return None
        done = "were turned by it" if exif == "apply" else f"were taken as they are stored, {why}"
        those = f"{self.count} of {self._images} {kind}{' ' * bool(kind)}images"
        return f"{those} carry an EXIF orientation and {done}"
