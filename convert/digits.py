"""scikit-learn's 1,797 handwritten digits, and which of them no run trains on."""

import numpy as np
from jaxtyping import Int, UInt8

_TEST_SHARE = 5  # one in so many
_SPLIT_SEED = 0


def load_digits() -> tuple[UInt8[np.ndarray, "digits 8 8"], Int[np.ndarray, " digits"]]:
    """Grey pixels and labels of all digits, in the order of their writers: the classes are mixed."""
    from sklearn import datasets  # late: it takes a second to import

    digits = datasets.load_digits()
    return np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target.astype(np.int32)


def held_out_indices(labels: Int[np.ndarray, " images"]) -> Int[np.ndarray, " held_out"]:
    """Sorted indices of the fixed test split of the digits: of each class a fifth, rounded to the nearest."""
    rng = np.random.default_rng(_SPLIT_SEED)
    chosen = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        chosen.append(members[: round(len(members) / _TEST_SHARE)])
    return np.sort(np.concatenate(chosen))
