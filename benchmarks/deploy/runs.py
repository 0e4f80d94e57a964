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
from crossvit_jax.config import CrossViTConfig
from crossvit_jax.preprocess import UnreadableImage
from train.config import TrainConfig
from train.data.datasets import open_image_sets
from train.data.sources import ImageSets, Source
from train.images.transforms import eval_transform
from train.inference.command import tell_notes
from train.inference.model import load_classifier_weights
from train.optim.quantize import require_qwix
from train.run.folder import read_settings
from train.run.progress import open_bar
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
    """A run in floating point, and the quantisation-aware one that goes with it."""

    run: Run
    qat: Run | None
    sets: ImageSets
    classes: Int[np.ndarray, " classes"]  # for each label of the data set, the output that stands for it

    @property
    def config(self) -> CrossViTConfig:
        return self.run.weights.config


def open_run(source: str, *, dataset: str | None, data_dir: str | None) -> Run:
    """The weights and settings of a run.

    Args:
        source: the folder of a training run, or another source that `convert.load_weights` reads.
        dataset, data_dir: instead of the run's; a source that is no run needs the former.

    Raises:
        ConversionError, SettingsError: see `load_classifier_weights`; the data set is not known; or a run was trained
            for other integers than int8, or qwix is needed for it and not installed.
    """
    if Path(source, "config.json").is_file():
        settings = read_settings(source)
    elif dataset is not None:
        settings = TrainConfig()
    elif not Path(source).exists():
        raise SettingsError(f"{source}: no such run; --runs takes folders of training runs")
    else:
        raise SettingsError(f"{source} is no folder of a training run: name what it was trained on with --dataset")
    changes = {"dataset": dataset, "data_dir": data_dir}
    settings = dataclasses.replace(settings, **{name: value for name, value in changes.items() if value is not None})
    if settings.qat is not None:
        require_qwix(f"{source} (trained with --qat)")
        if settings.qat != "int8":
            raise SettingsError(f"{source} was trained with --qat {settings.qat}; the forms compared here are int8")
    return Run(source, settings, load_classifier_weights(source).astype(np.dtype(np.float32)))


def pair(runs: Sequence[Run]) -> list[tuple[Run, Run | None]]:
    """Each run in floating point, and the quantisation-aware one that goes with it: the next one of the same model,
    image size and data set.

    Raises:
        SettingsError: a quantisation-aware run goes with none, or is the second.
    """
    pairs: list[tuple[Run, Run | None]] = []
    for run in runs:
        if run.settings.qat is None:
            pairs.append((run, None))
            continue
        place = next((i for i in reversed(range(len(pairs))) if pairs[i][0].task == run.task), None)
        if place is None:
            raise SettingsError(
                f"{run.source} was trained with --qat: name a run without it before, of the same variant, image size "
                "and data set"
            )
        if pairs[place][1] is not None:
            raise SettingsError(f"{run.source} is a second run with --qat for {pairs[place][0].source}")
        pairs[place] = pairs[place][0], run
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


def evenly(source: Source, count: int) -> list[int]:
    """Indices of up to `count` images at even steps, so that each class has its share where they are sorted."""
    return [index * len(source) // count for index in range(count)] if len(source) > count else [*range(len(source))]


def read_images(
    source: Source, indices: Sequence[int], weights: Weights, file: Path
) -> tuple[Float32[np.ndarray, "images height width 3"], Int[np.ndarray, " images"]]:
    """The images as evaluation sees them, and their labels.

    Unreadable ones are named on stderr and left out; a progress bar is there on a terminal.

    Args:
        file: in which the images are kept; what is returned lies there.

    Raises:
        SettingsError: none of them could be read.
        DataError: the data set cannot be read any further.
    """
    config = weights.config
    transform, labels = eval_transform(config, weights.exif or "keep"), []
    images = np.lib.format.open_memmap(file, "w+", np.float32, (len(indices), *config.image_size, 3))
    with open_bar(total=len(indices), unit=" images") as bar:
        for index in indices:
            try:
                sample = transform(source[index])
            except UnreadableImage as error:
                say(f"{error}: left out")
            else:
                images[len(labels)] = sample["image"]
                labels.append(sample["label"])
            bar.update()
    if not labels:
        raise SettingsError(f"none of the {len(indices)} images could be read")
    images.flush()
    return images[: len(labels)], np.array(labels)
