"""Everything about a run that can be wrong is found here, before anything is trained or written."""

import dataclasses
import importlib.util
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from convert import ConversionError
from convert.class_names import unlike_timm
from convert.command_line import leave_if_run_anew
from convert.errors import SettingsError
from convert.metadata import describe, understand
from convert.training.state import TrainingState
from convert.weights import Weights
from crossvit_jax.preprocess import limit_pixels
from train.config import TrainConfig, steps_per_epoch
from train.data.datasets import check_trainable, open_image_sets
from train.data.sources import ImageSets
from train.devices.attention import choose_attention
from train.devices.memory import available_memory, check_image_size
from train.devices.mesh import check_divides, default_mix_group, default_precision, make_mesh, precision_note
from train.images.rand_augment import check_augment_on, device_can_augment
from train.images.transforms import require_timm, train_transform
from train.optim.carried import check_carried, read_carried
from train.optim.quantize import require_qwix
from train.recipes import RECIPES
from train.run.folder import begun_settings, check_same_run, describe_run, newest_checkpoint, read_run
from train.tasks.begin import check_task, make_task, make_teacher, starting_model, variants_of
from train.tasks.task import Task

_BEGINNINGS = ("init", "resume")  # settings that name weights to begin with


@dataclass(frozen=True)
class Job:
    """A run that is ready to start, or to go on."""

    config: TrainConfig  # nothing left open that depends on the machine
    task: Task
    image_sets: ImageSets
    mesh: Mesh
    weights: Weights | None  # to start from; none: fresh ones, or those of the checkpoint that is continued
    described: dict[str, Any]  # the content of config.json
    resumed: bool  # whether the folder holds this run already
    notes: tuple[str, ...] = ()  # what the user should know of the data and the weights
    carried: TrainingState | None = None  # of `config.resume`, where its training goes on

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.image_sets.train), self.config.batch_size, self.config.repeated_aug)

    @property
    def eval_batch_size(self) -> int:
        """That of training, or less where the held-out images are fewer."""
        devices = self.mesh.size
        return min(self.config.batch_size, -(-len(self.image_sets.held_out) // devices) * devices)

    @property
    def eval_steps(self) -> int:
        return -(-len(self.image_sets.held_out) // self.eval_batch_size)


def prepare(config: TrainConfig) -> Job:
    """Check the settings against each other, the machine, the data and the run's folder.

    Raises SettingsError for the first mistake. The digits are prepared here if they never were.
    """
    leave_if_run_anew()
    limit_pixels(config.max_pixels)
    saved = read_run(config.output)
    if saved is None and config.init is None and config.resume is None:
        config.model_config(num_classes=1)  # the variant and the image size; the classes are not known yet
    if config.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise SettingsError("--wandb needs the package wandb, which is not installed: pip install wandb")
    if jax.config.jax_disable_jit:
        raise SettingsError("JAX_DISABLE_JIT is set, and a run's programs are compiled before it starts: unset it")
    if config.qat is not None:
        require_qwix("--qat")
    mesh = make_mesh(config.mesh)
    _check_image_size(config, mesh)
    config = dataclasses.replace(config, augment_on=augment_on(config, saved))
    check_augment_on(config)
    require_timm(config, may_augment_elsewhere=saved is None and device_can_augment(config))
    if jax.process_count() > 1 and config.output is None:
        raise SettingsError("with several processes, --output must name the run's folder, on a disk that all share")
    check_divides(config, mesh)
    if config.task == "classification":
        config = dataclasses.replace(config, mix_group=mix_group(config, saved, mesh))
    try:
        begun, begun_names = (None, None) if saved is None else understand(saved["model"])
    except (KeyError, TypeError, ConversionError) as error:
        raise SettingsError(f"the run in {config.output} was begun by another version: {error}") from error
    check_task(config, saved)
    _check_beginning(config, saved)
    image_sets = _open_image_sets(config, begun_names, begun=saved is not None)
    if config.task == "classification":
        check_trainable(config, image_sets)
    if steps_per_epoch(len(image_sets.train), config.batch_size, config.repeated_aug) < 1:
        raise SettingsError(
            f"batch_size {config.batch_size} is more than the {len(image_sets.train)} training images"
            f"{', rounded down to a multiple of 256 with --repeated-aug' * (config.repeated_aug > 1)}: "
            "choose a smaller --batch-size"
        )

    starts_anew = saved is None or newest_checkpoint(Path(config.output)) == 0  # if not, --init may be gone by now
    if saved is not None and starts_anew:
        before = {name: getattr(config, name) or saved["train"].get(name) for name in _BEGINNINGS}
        config = dataclasses.replace(config, **before)
    carried = read_carried(config) if starts_anew and config.resume is not None else None
    model_config, weights = starting_model(
        config, image_sets.class_names, begun, starts_anew=starts_anew, carried=carried and carried.weights
    )
    config = dataclasses.replace(
        config,
        variant=model_config.name,
        workers=(os.cpu_count() or 1) if config.workers is None else config.workers,
        precision=config.precision or (saved or {}).get("train", {}).get("precision") or default_precision(mesh),
    )
    if config.augment_on == "host" and config.auto_augment not in {recipe.auto_augment for recipe in RECIPES.values()}:
        try:
            _ = train_transform(config, model_config).timm_transform
        except (AssertionError, ValueError, KeyError, IndexError) as error:
            raise SettingsError(f"timm does not understand auto_augment {config.auto_augment!r}") from error
    class_names = None if config.task == "pretraining" else image_sets.class_names  # which its model does not have
    described = describe_run(
        config,
        model=describe(model_config, class_names, config.exif, config.drawn_patch_sizes),
        data=_describe_data(config, image_sets),
    )
    described["id"] = uuid.uuid4().hex[:8] if saved is None else saved.get("id")
    if saved is not None:
        check_same_run(saved, described, config.output)
    kernel, kernel_notes = choose_attention(config.attention_kernel, model_config, config.precision, mesh)
    config = dataclasses.replace(config, attention_kernel=kernel)
    teacher, teacher_notes = None, []
    if config.distill is not None:
        begun_with = None if starts_anew else saved.get("teacher", {})  # the checkpoint has its parameters
        teacher, described["teacher"], teacher_notes = make_teacher(
            config, model_config, image_sets.class_names, mesh, begun_with
        )
    task = make_task(config, model_config, image_sets, teacher)
    variants_of(task)  # which are checked
    weight_notes = () if weights is None else weights.notes
    notes = [
        *image_sets.notes,
        *_order_note(config, image_sets),
        *_mix_note(config, mesh),
        *weight_notes,
        *kernel_notes,
        *teacher_notes,
        *precision_note(config.precision, mesh),
    ]
    if carried is not None:
        notes += check_carried(carried, config, steps_per_epoch=described["data"]["steps_per_epoch"])
    return Job(config, task, image_sets, mesh, weights, described, saved is not None, tuple(notes), carried)


def _check_image_size(config: TrainConfig, mesh: Mesh) -> None:
    """Raises SettingsError for a size that was asked for and certainly does not fit."""
    if config.image_size is None:
        return
    branches = config.model_config(num_classes=1).branches if config.init is config.resume is None else ()
    check_image_size(
        (config.image_size, config.image_size),
        branches,
        mesh,
        images=max(1, config.batch_size // (mesh.size * config.grad_accum)),
        available=available_memory(mesh),
        training=config.reduce_tokens is None,
    )


def _check_beginning(config: TrainConfig, saved: dict[str, Any] | None) -> None:
    """Raises SettingsError for a run that began with other weights than the command names: they would be ignored."""
    for name in _BEGINNINGS if saved is not None else ():
        if getattr(config, name) is not None and saved["train"].get(name) is None:
            raise SettingsError(f"the run in {config.output} was begun without --{name}: name a new folder")


def _open_image_sets(config: TrainConfig, class_names: tuple[str, ...] | None, *, begun: bool) -> ImageSets:
    """The data; for a run that was begun, an error says how to go on with data that have another place now."""
    try:
        return open_image_sets(config, class_names=class_names)
    except SettingsError as error:
        if not begun:
            raise
        raise SettingsError(
            f"{error}; if the data of the run in {config.output} were moved, give their place anew with --dataset or "
            "--data-dir"
        ) from error


def augment_on(config: TrainConfig, saved: dict[str, Any] | None) -> str:
    """Where to augment: where it was asked for, where the run that is continued did, or where it is faster.

    That is a GPU, whose few cores of the host could not feed it. Hosts of TPUs have many; there, the device's gathers
    are slow.
    """
    if config.augment_on is not None:
        return config.augment_on
    if saved is not None:
        return begun_settings(saved)["augment_on"]
    return "device" if jax.default_backend() == "gpu" and device_can_augment(config) else "host"


def mix_group(config: TrainConfig, saved: dict[str, Any] | None, mesh: Mesh) -> int:
    """The images that are mixed among themselves: as asked for, as in the run that is continued, or by the devices."""
    if saved is not None and config.mix_group in (None, RECIPES[config.recipe].mix_group):
        return begun_settings(saved)["mix_group"]
    return config.mix_group or default_mix_group(config, mesh)


def _mix_note(config: TrainConfig, mesh: Mesh) -> list[str]:
    """A note where images are sent from device to device to be mixed."""
    share = config.batch_size // mesh.size
    if config.mixup == config.cutmix == 0 or share % min(config.mix_group, config.batch_size) == 0:
        return []
    return [f"mix_group {config.mix_group} is no part of a device's {share} images: they are sent between devices"]


def _order_note(config: TrainConfig, image_sets: ImageSets) -> list[str]:
    """A note where nobody chose an order of the classes, and timm would have another."""
    unlike = unlike_timm(image_sets.class_names)
    if unlike is None or config.class_order is not None or not image_sets.sorted_by_name:
        return []
    return [f"the classes are sorted as text: {unlike}; --class-order natural takes that, --class-order text this"]


def _describe_data(config: TrainConfig, image_sets: ImageSets) -> dict[str, Any]:
    return {
        "train_images": len(image_sets.train),
        "held_out_images": len(image_sets.held_out),
        "held_out_split": image_sets.held_out_split,
        "steps_per_epoch": steps_per_epoch(len(image_sets.train), config.batch_size, config.repeated_aug),
        "fingerprint": image_sets.fingerprint,
    }
