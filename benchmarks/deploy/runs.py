"""The trained runs of the deployment benchmark: which belong together, and the images that they are tried on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int

from benchmarks.rounds import say
from convert.errors import SettingsError
from convert.weights import Weights
from crossvit_jax.preprocess import UnreadableImage, normalised
from train.data.sources import Source
from train.images.transforms import eval_transform
from train.inference.dataset import Data, open_data
from train.inference.model import load_classifier_weights
from train.optim.quantize import require_qwix
from train.run.folder import read_settings, run_behind
from train.tasks.classification import match_classes


@dataclass(frozen=True)
class Run:
    """Trained weights, and their images."""

    source: str
    weights: Weights  # in float32
    data: Data
    outputs: Int[np.ndarray, " classes"]  # that stand for the labels of the data set
    qat: str | None  # of the training

    @property
    def task(self) -> tuple:
        """What two runs have in common whose accuracies can be compared."""
        config = self.weights.config
        return config.name, config.image_size, config.num_classes, self.weights.class_names, self.data.dataset


def open_run(source: str, given: dict[str, Any]) -> Run:
    """The weights of a run, or of another source of `python -m convert`, and the images that they are tried on.

    Args:
        given: see `open_data`; a source that is no run needs its data set.

    Raises ConversionError or SettingsError: see `load_classifier_weights` and `open_data`; or the data set has other
    classes, a run was trained for other integers than int8, or qwix is needed for it and not installed.
    """
    weights = load_classifier_weights(source).astype(np.dtype(np.float32))
    behind = run_behind(source)
    qat = None if behind is None else read_settings(behind).qat
    if qat is not None:
        require_qwix(f"{source} (trained with --qat)")
        if qat != "int8":
            raise SettingsError(f"{source} was trained with --qat {qat}; the forms compared here are int8")
    data = open_data(given, "held-out", behind)
    outputs, notes = match_classes(data.class_names, weights.class_names, weights.config.num_classes)
    for note in (*data.notes, *notes):
        say(f"note: {source}: {note}")
    return Run(source, weights, data, outputs, qat)


def pair(runs: Sequence[Run]) -> list[tuple[Run, Run | None]]:
    """Each run in floating point, and the quantisation-aware one that follows it.

    Raises SettingsError if a quantisation-aware run follows none of the same model, image size, data set and classes.
    """
    pairs: list[tuple[Run, Run | None]] = []
    for run in runs:
        if run.qat is None:
            pairs.append((run, None))
        elif pairs and pairs[-1][1] is None and pairs[-1][0].task == run.task:
            pairs[-1] = pairs[-1][0], run
        else:
            raise SettingsError(
                f"{run.source} was trained with --qat: name it after a run without, of the same variant, image size, "
                "data set and classes"
            )
    return pairs


def read_images(
    source: Source, most: int, weights: Weights, file: Path
) -> tuple[Float32[np.ndarray, "images height width 3"], Int[np.ndarray, " images"], int]:
    """Images at even steps, so that each class has its share where they are sorted, as evaluation sees them.

    Returns them, in a file of that name; their labels; and how many of the `most` that were asked for could not be
    read: these are named on stderr. Raises SettingsError if that is all, DataError if the data set cannot be read.
    """
    config, count = weights.config, min(most, len(source))
    transform, labels = eval_transform(config, weights.exif or "keep"), []
    images = np.lib.format.open_memmap(file, "w+", np.float32, (count, *config.image_size, 3))
    for number in range(count):
        try:
            sample = transform(source[number * len(source) // count])
        except UnreadableImage as error:
            say(f"{error}: left out")
        else:
            images[len(labels)] = normalised(sample["image"])
            labels.append(sample["label"])
    if not labels:
        raise SettingsError(f"none of the {count} images could be read")
    images.flush()
    return images[: len(labels)], np.array(labels), count - len(labels)
