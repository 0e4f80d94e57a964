"""Everything about a run that can be wrong is found here, before anything is trained or written."""

import dataclasses
import os
from dataclasses import dataclass

from jax.sharding import Mesh

from crossvit_jax import CrossViTConfig
from train.config import RECIPES, SettingsError, TrainConfig
from train.data import steps_per_epoch
from train.run_folder import check_output
from train.sharding import make_mesh
from train.sources import ImageSets, open_image_sets
from train.transforms import train_transform


@dataclass(frozen=True)
class Job:
    """A run that is ready to start."""

    config: TrainConfig  # nothing left open that depends on the machine
    model_config: CrossViTConfig
    image_sets: ImageSets
    mesh: Mesh

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.image_sets.train), self.config.batch_size)

    @property
    def eval_batch_size(self) -> int:
        """That of training, or less where the held-out images are fewer."""
        devices = self.mesh.size
        return min(self.config.batch_size, -(-len(self.image_sets.held_out) // devices) * devices)

    @property
    def eval_steps(self) -> int:
        return -(-len(self.image_sets.held_out) // self.eval_batch_size)


def prepare(config: TrainConfig) -> Job:
    """Check the settings against each other, the machine and the data. Raises SettingsError for the first mistake.

    The digits are prepared here if they never were.
    """
    check_output(config)
    config.model_config(num_classes=1)  # the variant and the image size; the classes are not known yet
    mesh = _mesh()
    if config.batch_size % mesh.size:
        raise SettingsError(f"batch_size {config.batch_size} cannot be divided among {mesh.size} devices")
    image_sets = open_image_sets(config)
    if config.batch_size > len(image_sets.train):
        raise SettingsError(
            f"batch_size {config.batch_size} is more than the {len(image_sets.train)} training images: "
            "choose a smaller --batch-size"
        )
    if config.workers is None:
        config = dataclasses.replace(config, workers=os.cpu_count() or 1)
    model_config = config.model_config(num_classes=len(image_sets.class_names))
    if config.auto_augment not in {recipe.auto_augment for recipe in RECIPES.values()}:
        _check_auto_augment(config, model_config)
    return Job(config, model_config, image_sets, mesh)


def _mesh() -> Mesh:
    try:
        return make_mesh()
    except RuntimeError as error:  # jax found no usable device
        raise SettingsError(f"jax cannot start: {str(error).splitlines()[0]}") from error


def _check_auto_augment(config: TrainConfig, model_config: CrossViTConfig) -> None:
    try:
        _ = train_transform(config, model_config).timm_transform
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        raise SettingsError(f"timm does not understand auto_augment {config.auto_augment!r}") from error
