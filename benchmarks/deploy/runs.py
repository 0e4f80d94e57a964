"""The trained runs of the deployment benchmark: which belong together, and the images that they are tried on."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int

from benchmarks.rounds import say
from convert.errors import SettingsError
from convert.weights import Weights
from crossvit_jax.preprocess import UnreadableImage, normalised
from train.config import TrainConfig
from train.data.datasets import open_image_sets
from train.data.sources import ImageSets, Source
from train.images.transforms import eval_transform
from train.inference.command import tell_notes
from train.inference.model import load_classifier_weights
from train.optim.quantize import require_qwix
from train.run.folder import read_settings
from train.tasks.classification import match_classes


@dataclass(frozen=True)
class Run:
    """Trained weights, and the settings that tell the data set they were trained on."""

    source: str
    settings: TrainConfig
    weights: Weights  # in float32

    @property
    def task(self) -> tuple:
        """What two runs have in common whose accuracies can be compared."""
        config = self.weights.config
        return config.name, config.image_size, config.num_classes, self.settings.dataset


@dataclass(frozen=True)
class Model:
    """A run in floating point, the quantisation-aware one that goes with it, and their images."""

    run: Run
    qat: Run | None
    sets: ImageSets
    classes: Int[np.ndarray, " classes"]  # for each label of the data set, the output that stands for it


def open_run(source: str, *, dataset: str | None, data_dir: str | None) -> Run:
    """The weights and settings of a run, or of another source that `convert.load_weights` reads.

    Args:
        dataset, data_dir: instead of the run's; a source that is no run needs the former.

    Raises ConversionError or SettingsError: see `load_classifier_weights`; the data set is not known; or a run was
    trained for other integers than int8, or qwix is needed for it and not installed.
    """
    if Path(source, "config.json").is_file():
        settings = read_settings(source)
    elif dataset is not None:
        settings = TrainConfig()
    elif not Path(source).exists():
        raise SettingsError(f"{source}: no such run; --runs takes folders of training runs")
    else:
        raise SettingsError(f"{source} is no folder of a training run: name what it was trained on with --dataset")
    settings = dataclasses.replace(
        settings, dataset=dataset or settings.dataset, data_dir=data_dir or settings.data_dir
    )
    if settings.qat is not None:
        require_qwix(f"{source} (trained with --qat)")
        if settings.qat != "int8":
            raise SettingsError(f"{source} was trained with --qat {settings.qat}; the forms compared here are int8")
    return Run(source, settings, load_classifier_weights(source).astype(np.dtype(np.float32)))


def pair(runs: Sequence[Run]) -> list[tuple[Run, Run | None]]:
    """Each run in floating point, and the quantisation-aware one that follows it.

    Raises SettingsError if a quantisation-aware run follows none of the same model, image size and data set.
    """
    pairs: list[tuple[Run, Run | None]] = []
    for run in runs:
        if run.settings.qat is None:
            pairs.append((run, None))
        elif pairs and pairs[-1][1] is None and pairs[-1][0].task == run.task:
            pairs[-1] = pairs[-1][0], run
        else:
            raise SettingsError(
                f"{run.source} was trained with --qat: name it after a run without, of the same variant, image size "
                "and data set"
            )
    return pairs


def open_model(run: Run, qat: Run | None) -> Model:
    """The model with its images. Raises SettingsError if the data set cannot be opened, or has other classes."""
    sets = open_image_sets(run.settings, class_names=run.weights.class_names)
    for other in filter(None, (qat, run)):
        weights = other.weights
        classes, notes = match_classes(sets.class_names, weights.class_names, weights.config.num_classes)
        tell_notes("python -m benchmarks.deploy", [f"{other.source}: {note}" for note in notes])
    if qat is not None and qat.weights.class_names != run.weights.class_names:
        raise SettingsError(f"{qat.source} and {run.source} have their classes in another order")
    return Model(run, qat, sets, classes)


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
