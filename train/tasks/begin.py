"""The model that a run trains, the weights that it starts from, and the task around it, by `config.task`."""

import dataclasses
from typing import Any

import numpy as np
from jax.sharding import Mesh

from convert import load_weights
from convert.changes.dense import adapt_to_task, class_axes, with_fresh_classes
from convert.errors import ConversionError, SettingsError
from convert.metadata import describe_weights, understand
from convert.tree import nest
from convert.weights import Weights
from crossvit_jax.config import CUSTOM, CrossViTConfig, DenseConfig, build_dense_config, get_config
from train.config import TrainConfig, steps_per_epoch
from train.data.dense.samples import DenseSets, DenseSource, Reclassed
from train.data.entropies import parting_entropies
from train.data.sources import ImageSets
from train.devices.attention import choose_attention
from train.recipes import RECIPES
from train.run.folder import begun_settings
from train.tasks import classification
from train.tasks.classification import Classification
from train.tasks.detection import Detection
from train.tasks.distillation import Teacher
from train.tasks.pretraining.dino import Dino
from train.tasks.pretraining.simmim import Simmim
from train.tasks.pretraining.weights import starting_model as starting_pretraining
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
    if config.task == "pretraining":
        return starting_pretraining(config, begun, starts_anew=starts_anew)
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


def check_task(config: TrainConfig, saved: dict[str, Any] | None) -> None:
    """Raises SettingsError if the run that is continued, whose `config.json` it is, learns something else."""
    learned = config.task if saved is None else begun_settings(saved)["task"]
    if learned != config.task:
        raise SettingsError(f"the run in {config.output} learns {learned}, not {config.task}: name a new folder")


def settings_of(task: str) -> TrainConfig:
    """Settings that do for a model which is not trained."""
    return TrainConfig() if task == "classification" else RECIPES[task]


def read_teacher(config: TrainConfig) -> Weights:
    """The classifier of `config.distill`. Raises SettingsError if it cannot be read, or is no such thing."""
    what = f"--distill {config.distill}"
    try:
        weights = load_weights(config.distill).astype(np.dtype(np.float32))
    except ConversionError as error:
        raise SettingsError(f"--distill: {error}") from error
    if task_of(weights.config) != "classification":
        raise SettingsError(f"{what} is a model for {task_of(weights.config)}: only a classifier can teach one")
    if weights.config.in_chans != 3:
        raise SettingsError(f"{what} takes images of {weights.config.in_chans} channels, and runs read colour images")
    if weights.non_finite():
        raise SettingsError(f"{what}: {weights.non_finite()}")
    return weights


def make_teacher(
    config: TrainConfig,
    student: CrossViTConfig,
    class_names: tuple[str, ...],
    mesh: Mesh,
    described: dict[str, Any] | None = None,
) -> tuple[Teacher, dict[str, Any], list[str]]:
    """The teacher of a run, how it is described in the run's folder, and what the user should know of it.

    Args:
        config: with the kernel of attention that was chosen for the student.
        class_names: of the run.
        described: how it was; then its parameters come from elsewhere, and `config.distill` may be gone.

    Raises SettingsError as `read_teacher`, or if it does not know these classes and no others, or sees images of
    another shape.
    """
    what, params, told = f"--distill {config.distill}", None, ()
    if described is None:
        weights = read_teacher(config)
        described, params, told = describe_weights(weights), nest(weights.tensors), weights.notes
    try:
        model, known = understand(described)
    except (KeyError, TypeError, ConversionError) as error:
        raise SettingsError(f"the run in {config.output} was begun by another version: {error}") from error
    try:
        outputs, notes = classification.match_classes(class_names, known, model.num_classes)
    except SettingsError as error:
        raise SettingsError(f"{what}: {error}") from error
    if len(outputs) != model.num_classes:
        counts = f"the data set has {len(outputs)} classes, the weights have {model.num_classes}"
        raise SettingsError(f"{what}: {counts}: only a classifier of the same classes can teach this one")
    (rows, columns), (height, width) = model.image_size, student.image_size
    if rows * width != columns * height:
        sizes = f"{rows} x {columns} pixels, and this model {height} x {width}"
        raise SettingsError(f"{what} sees images of {sizes}: they would be distorted")
    if rows != height:
        notes = [*notes, f"it sees the images of {height} x {width} pixels resized to {rows} x {columns}"]
    # the same kernel as the student's, unless it cannot be had for this one
    wanted = "xla" if config.attention_kernel == "xla" else "auto"
    kernel, kernel_notes = choose_attention(wanted, model, config.precision, mesh, training=False)
    notes = [f"the teacher, {model.name}: {note}" for note in [*told, *notes, *kernel_notes]]
    return Teacher(model, tuple(outputs.tolist()), kernel, params), described, notes


def make_task(config: TrainConfig, model_config: ModelConfig, sets: ImageSets, teacher: Teacher | None = None) -> Task:
    """The task of a run.

    Args:
        teacher: that a classifier follows.
    """
    if config.task == "detection":
        return Detection(config, model_config, sets.class_names, sets.most_boxes, sets.category_ids)
    if config.task == "segmentation":
        return Segmentation(config, model_config, sets.class_names)
    if config.method == "simmim":
        return Simmim(config, model_config, sets.class_names)
    if config.method == "dino":
        steps = steps_per_epoch(len(sets.train), config.batch_size)
        return Dino(config, model_config, sets.class_names, steps)
    balanced = config.class_weights == "balanced"
    weights = classification.balanced_weights(sets.train, sets.class_names) if balanced else None
    task = Classification(config, model_config, sets.class_names, weights, teacher=teacher)
    if not config.patch_sizes:
        return task
    entropies = parting_entropies(sets.train, task.transform(training=False), len(config.patch_sizes))
    return dataclasses.replace(task, entropies=entropies)


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
