"""Precision, recall and F1 of a confusion matrix, and how far probabilities are from the shares that they promise."""

import numpy as np
from jaxtyping import Bool, Float, Int

_BINS = 15  # of equal width, as in Guo et al. 2017, arXiv 1706.04599


def class_rates(confusion: Int[np.ndarray, "classes classes"]) -> dict[str, Float[np.ndarray, " classes"]]:
    """Precision, recall and F1 of each class in percent, by name; 0 where a class has no images to be a share of.

    Args:
        confusion: counts by true and predicted class.
    """
    right, true, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    return {
        "precision": _percent(right, predicted),
        "recall": _percent(right, true),
        "f1": _percent(2 * right, true + predicted),
    }


def mean_rates(confusion: Int[np.ndarray, "classes classes"]) -> dict[str, float]:
    """The means of `class_rates`: of all classes that occur, as true or as predicted ones (`macro`), and weighted by
    the number of their images (`weighted`)."""
    true, occurs = confusion.sum(1), confusion.sum(0) + confusion.sum(1) > 0
    means = {}
    for name, rates in class_rates(confusion).items():
        means[f"{name}_macro"] = float(rates[occurs].mean())
        means[f"{name}_weighted"] = float(np.average(rates, weights=true))
    return means


def calibration_error(confidence: Float[np.ndarray, " images"], right: Bool[np.ndarray, " images"]) -> float:
    """The expected calibration error in percent: in 15 bins of confidence, the mean distance of its mean from accuracy.

    Args:
        confidence: the probability of the predicted class, 0 to 1.
        right: whether that is the true one.
    """
    places = np.clip(np.ceil(confidence * _BINS).astype(int) - 1, 0, _BINS - 1)
    gaps = np.bincount(places, weights=confidence - right, minlength=_BINS)  # mean distance times images
    return 100 * float(np.abs(gaps).sum()) / len(confidence)


def _percent(part: Int[np.ndarray, " classes"], whole: Int[np.ndarray, " classes"]) -> Float[np.ndarray, " classes"]:
    return 100 * np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)
