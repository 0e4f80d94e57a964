"""Which images are held out where a data set does not say it itself."""

import numpy as np
from jaxtyping import Bool, Int


def draw_held_out(count: int, *, fraction: float, seed: int) -> Bool[np.ndarray, " count"]:
    """Which of two images or more are held out: the share `fraction`, at least one, and not all."""
    chosen = np.random.default_rng(seed).permutation(count)[: min(max(1, round(fraction * count)), count - 1)]
    held_out = np.zeros(count, bool)
    held_out[chosen] = True
    return held_out


def draw_of_each_class(
    labels: Int[np.ndarray, " images"], *, fraction: float, seed: int
) -> Bool[np.ndarray, " images"]:
    """Which images are held out: of each class the share `fraction`, at least one, and not all of two or more."""
    rng = np.random.default_rng(seed)
    held_out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        held_out[members[rng.permutation(len(members))[:count]]] = True
    return held_out
