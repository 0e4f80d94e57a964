"""How well the classes of pixels are told: figures from a confusion matrix summed over a data set."""

import numpy as np
from jaxtyping import Float, Int, UInt8

from train.images.geometry import IGNORED


def segment_confusion(
    true: UInt8[np.ndarray, "height width"], predicted: UInt8[np.ndarray, "height width"], num_classes: int
) -> Int[np.ndarray, "classes classes"]:
    """How many pixels of a picture there are of each true (row) and predicted (column) class; `IGNORED` ones left
    out."""
    counted = true != IGNORED
    pairs = true[counted].astype(np.int64) * num_classes + predicted[counted]
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def mean_segment_rates(confusion: Int[np.ndarray, "classes classes"]) -> dict[str, float]:
    """`miou` and `macc`, means over the classes that have an IoU or accuracy, and `aacc`, the share of all pixels that
    are told right: between 0 and 1, in mmsegmentation's words. Empty if no pixel was counted."""
    total = confusion.sum()
    if not total:
        return {}
    rates = segment_rates(confusion)
    means = {f"m{name}": float(np.nanmean(values)) for name, values in rates.items()}
    return means | {"aacc": float(np.trace(confusion) / total)}


def segment_rates(confusion: Int[np.ndarray, "classes classes"]) -> dict[str, Float[np.ndarray, " classes"]]:
    """Each class's `iou`, intersection over union of true and predicted pixels, and `acc`, the share of its true pixels
    that are told right. NaN where that is 0 / 0: a class that is nowhere has neither."""
    right, true, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    with np.errstate(invalid="ignore"):
        return {"iou": right / (true + predicted - right), "acc": right / true}
