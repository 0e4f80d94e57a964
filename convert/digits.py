"""scikit-learn's 1,797 handwritten digits, and which of them no run trains on."""

import gzip
import importlib.util
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

from convert.errors import require

_TEST_SHARE = 5  # one in so many
_SPLIT_SEED = 0


def load_digits() -> tuple[UInt8[np.ndarray, "digits 8 8"], Int[np.ndarray, " digits"]]:
    """Grey pixels and labels of all digits, in the order of their writers: the classes are mixed.

    Raises MissingExtra where scikit-learn is not installed.
    """
    require("the digits", "sklearn", verb="need")
    rows = _stored()
    return np.round(rows[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8), rows[:, -1].astype(np.int32)


def _stored() -> UInt8[np.ndarray, "digits 65"]:
    """The file that scikit-learn carries: 64 pixels from 0 to 16, and the digit. Its reader is slow to import."""
    package = importlib.util.find_spec("sklearn").submodule_search_locations[0]
    with gzip.open(Path(package, "datasets", "data", "digits.csv.gz")) as file:
        return np.loadtxt(file, np.uint8, delimiter=",")


def held_out_indices(labels: Int[np.ndarray, " images"]) -> Int[np.ndarray, " held_out"]:
    """Sorted indices of the fixed test split of the digits: of each class a fifth, rounded to the nearest."""
    rng = np.random.default_rng(_SPLIT_SEED)
    chosen = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        chosen.append(members[: round(len(members) / _TEST_SHARE)])
    return np.sort(np.concatenate(chosen))
