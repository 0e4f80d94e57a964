"""How good features are that nobody gave labels for: held-out losses, and neighbours."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from convert.files import check_replaceable, write_whole
from train.tasks.evaluated import is_evaluation
from train.tasks.task import Metric

KNN = Metric("knn", "k-NN accuracy", "%", "max")
_NEIGHBOURS, _TEMPERATURE = 20, 0.07  # DINO's (arXiv 2104.14294)
_AT_A_TIME = 1024  # images that are compared with all others
_NUMBERS = "evaluation.json"


def metrics_of(class_names: tuple[str, ...]) -> tuple[Metric, ...]:
    """Those of data with these classes; of none or a single one there is nothing to tell."""
    return (KNN,) if len(class_names) > 1 else ()


class PretrainingScores:
    """The loss over all images of a data set, and the k-NN accuracy of their features where they have labels.

    Args:
        class_names: of the data.
        mean_loss: the loss, by the sums of `Task.evaluate` over all images and the number of images.
    """

    def __init__(self, class_names: tuple[str, ...], mean_loss: Callable[[dict[str, Any], int], float]):
        self._class_names, self._mean_loss, self._images = class_names, mean_loss, 0
        self._sums: dict[str, np.ndarray] = {}
        self._features: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []

    def add(self, outputs: Mapping[str, Any]) -> None:
        counted = outputs["mask"] > 0
        self._images += int(counted.sum())
        for name, value in outputs["sums"].items():
            self._sums[name] = self._sums.get(name, 0) + value.astype(np.float64)
        if "features" in outputs:
            self._features.append(outputs["features"][counted])
            self._labels.append(outputs["label"][counted])

    def values(self) -> dict[str, float]:
        """`loss`, and where there are labels `knn`: the share in percent of the images whose class is that of the 20
        nearest others among them."""
        if not self._images:
            return {"images": 0}
        told = {"images": self._images, "loss": float(self._mean_loss(self._sums, self._images))}
        if metrics_of(self._class_names) and self._images > 1:
            features, labels = np.concatenate(self._features), np.concatenate(self._labels)
            predicted = nearest_classes(features, labels, len(self._class_names))
            told["knn"] = 100 * float(np.mean(predicted == labels))
        return told

    def details(self) -> dict[str, float]:
        return {}

    def check_place(self, folder: Path) -> None:
        """See `train.tasks.task.Scores`: an earlier evaluation in the folder is replaced."""
        check_replaceable([folder / _NUMBERS], lambda _: is_evaluation(folder / _NUMBERS, "loss"))

    def write(self, folder: Path, *, about: Mapping[str, Any], images: Sequence[str]) -> list[str]:
        """The numbers."""
        write_whole(folder / _NUMBERS, (json.dumps({**about, **self.values()}, indent=2) + "\n").encode())
        return [_NUMBERS]


def nearest_classes(
    features: Float[np.ndarray, "images dim"],
    labels: Int[np.ndarray, " images"],
    num_classes: int,
    queries: Float[np.ndarray, "queries dim"] | None = None,
) -> Int[np.ndarray, " queries"]:
    """The class of each query by its 20 nearest images, which vote by exp(cosine / 0.07), as DINO evaluates features.

    Args:
        queries: none: the images themselves, each by the others.
    """
    unit = _unit(features)
    asked = unit if queries is None else _unit(queries)
    count = min(_NEIGHBOURS, len(unit) - (queries is None))
    classes = []
    for start in range(0, len(asked), _AT_A_TIME):
        cosines = asked[start : start + _AT_A_TIME] @ unit.T
        if queries is None:
            rows = np.arange(len(cosines))
            cosines[rows, start + rows] = -np.inf
        nearest = np.argpartition(-cosines, count - 1, axis=1)[:, :count]
        votes = np.exp((np.take_along_axis(cosines, nearest, axis=1) - 1) / _TEMPERATURE)
        by_class = np.zeros((len(cosines), num_classes))
        np.add.at(by_class, (np.arange(len(cosines))[:, None], labels[nearest]), votes)
        classes.append(by_class.argmax(1))
    return np.concatenate(classes)


def _unit(x: Float[np.ndarray, "images dim"]) -> Float[np.ndarray, "images dim"]:
    x = np.asarray(x, np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
