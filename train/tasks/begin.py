"""The model that a run trains, the weights that it starts from, and the task around it, by `config.task`."""

import dataclasses
from typing import Any

import numpy as np

from convert import load_weights
from convert.dense import adapt_to_task, class_axes, with_fresh_classes
from convert.errors import ConversionError, SettingsError
from convert.weights import Weights
from crossvit_jax.config import CUSTOM, CrossViTConfig, DenseConfig, build_dense_config, get_config
from train.config import TrainConfig
from train.data.dense.samples import DenseSets, DenseSource, Reclassed
from train.data.sources import ImageSets
from train.recipes import RECIPES
from train.tasks import classification
from train.tasks.classification import Classification
from train.tasks.detection import Detection
from train.tasks.segmentation import Segmentation
from train.tasks.task import Task

ModelConfig = CrossViTConfig | DenseConfig
TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "detection": Detection,
    "segmentation": Segmentation,
}


def starting_model(
    config: TrainConfig,
    class_names: tuple[str, ...],
    begun: ModelConfig | None,
    *,
    starts_anew: bool,
    carried: Weights | None = None,
) -> tuple[ModelConfig, Weights | None]:
    """The model of a run for the classes of a data set, and the weights of `config.init` where it starts from them.

    Args:
        begun: the model of the run that is continued; none: it is a new one.
        starts_anew: there is no checkpoint to continue from.
        carried: the weights of `config.resume`, whose training goes on.

    Raises SettingsError if the settings make no model, or the weights are not for such a one.
    """
    if config.task == "classification":
        return classification.starting_model(config, class_names, begun, starts_anew=starts_anew, carried=carried)
    if carried is not None:
        raise SettingsError(
            f"--resume {config.resume} is of a classifier, whose training cannot go on as {config.task}: --init begins "
            "anew with its weights"
        )
    settings = {"num_classes": len(class_names), **config.model_overrides(), **config.dense_overrides()}
    try:
        if starts_anew and config.init is not None:
            weights = _dense_weights(config, class_names, settings)
            return weights.config, weights
        if begun is not None:
            name = begun.name if config.variant in (None, begun.name) else get_config(config.variant).name
            return begun.replace(name=name, **settings), None
        branches = settings.pop("branches", None)
        backbone = CrossViTConfig(name=CUSTOM, branches=branches) if branches else get_config(config.variant or "ti")
        return build_dense_config(config.task, backbone, **settings), None
    except (ConversionError, ValueError) as error:
        raise SettingsError(str(error)) from error


def task_of(model_config: ModelConfig) -> str:
    """What a model is for: classification, detection or segmentation."""
    return model_config.task if isinstance(model_config, DenseConfig) else "classification"


def check_task(config: TrainConfig, begun: ModelConfig | None) -> None:
    """Raises SettingsError if the run that is continued learns something else."""
    if begun is not None and task_of(begun) != config.task:
        raise SettingsError(f"the run in {config.output} learns {task_of(begun)}, not {config.task}: name a new folder")


def settings_of(task: str) -> TrainConfig:
    """Settings that do for a model which is not trained."""
    return TrainConfig() if task == "classification" else RECIPES[task]


def make_task(config: TrainConfig, model_config: ModelConfig, sets: ImageSets) -> Task:
    """The task of a run."""
    if config.task == "detection":
        return Detection(config, model_config, sets.class_names, sets.most_boxes, sets.category_ids)
    if config.task == "segmentation":
        return Segmentation(config, model_config, sets.class_names)
    balanced = config.class_weights == "balanced"
    weights = classification.balanced_weights(sets.train, sets.class_names) if balanced else None
    return Classification(config, model_config, sets.class_names, weights)


def variants_of(task: Task) -> tuple[Task, ...]:
    """The tasks of which one is drawn for each step, the one that takes most work first; in most runs the task alone.

    Raises SettingsError if the model cannot be trained with the patch sizes asked for.
    """
    sizes = task.config.drawn_patch_sizes
    if not sizes:
        return (task,)
    model = task.model_config
    try:
        configs = [model.at_patch_size(size) for size in sizes]
    except ValueError as error:
        raise SettingsError(f"--patch-sizes: {error}") from None
    if model.patch_size not in sizes:
        own = ",".join(map(str, model.patch_size))
        raise SettingsError(f"--patch-sizes must name {own} too: that is the model's own, which evaluations take")
    configs.sort(key=lambda config: sum(rows * columns for rows, columns in config.grid_size), reverse=True)
    return tuple(dataclasses.replace(task, patch_size=config.patch_size) for config in configs)


def matched(
    task: Detection | Segmentation, known: tuple[str, ...] | None, sets: DenseSets, source: DenseSource
) -> tuple[Detection | Segmentation, DenseSource, list[str]]:
    """The task for the images of a data set, these with the classes of the model, and what the user should know.

    Args:
        known: the names of the model's classes; none: it knows none.
        source: a part of the data set.

    Raises SettingsError if the data set has classes that the model does not have.
    """
    classes, notes = classification.match_classes(sets.class_names, known, task.model_config.num_classes)
    places = tuple(classes.tolist())
    if places != tuple(range(len(places))):
        source = Reclassed(source, places)
    names = known or sets.class_names
    if isinstance(task, Segmentation):
        return dataclasses.replace(task, class_names=names), source, notes
    ids: list[int | None] = [None] * len(names)
    for place, category in zip(places, sets.category_ids, strict=True):
        ids[place] = category
    settings = {"class_names": names, "most_boxes": sets.most_boxes, "category_ids": tuple(ids)}
    return dataclasses.replace(task, **settings), source, notes


def _dense_weights(config: TrainConfig, class_names: tuple[str, ...], settings: dict[str, Any]) -> Weights:
    """The weights of `config.init` as those of a detector or segmenter for these classes; changes are in `notes`.

    What is new in it is drawn from the seed. The last layer of a detector or segmenter is kept if it is known to be, or
    may be, for these very classes.
    """
    branches = {"branches": settings["branches"]} if config.branches else {}
    weights = load_weights(config.init, **branches)
    held = weights.config.name
    if config.variant not in (None, held) and get_config(config.variant).name != held:
        raise SettingsError(f"--init {config.init} holds {held}, not the variant {config.variant}")
    notes: list[str] = []
    if task_of(weights.config) == config.task:
        weights, notes = _fit_classes(weights, class_names, seed=config.seed)
    # runs read colour images
    weights = adapt_to_task(weights, config.task, {"in_chans": 3, **settings}, seed=config.seed)
    if weights.non_finite():
        raise SettingsError(f"--init {config.init}: {weights.non_finite()}")
    return dataclasses.replace(weights, notes=(*weights.notes, *notes))


def _fit_classes(weights: Weights, class_names: tuple[str, ...], *, seed: int) -> tuple[Weights, list[str]]:
    """The weights of a detector or segmenter with outputs for these classes, unless there is another number of them."""
    count = len(class_names)
    if weights.config.num_classes != count:
        return weights, []
    if weights.class_names is None:
        return weights, [f"the last layer is kept: it has {count} classes too, and their names are not known"]
    if weights.class_names == class_names:
        return weights, ["the last layer is kept: it is for these classes"]
    if sorted(weights.class_names) == sorted(class_names) and len(set(class_names)) == count:
        places = [weights.class_names.index(name) for name in class_names]
        axes = class_axes(weights.config)
        moved = {name: np.take(weights.tensors[name], places, axis) for name, axis in axes.items()}
        weights = dataclasses.replace(weights, tensors={**weights.tensors, **moved}, class_names=class_names)
        return weights, ["the last layer is kept: it is for these classes, and its outputs are put into their order"]
    note = f"new last layer: the {count} classes are others than those of the weights"
    return with_fresh_classes(weights, seed=seed), [note]
