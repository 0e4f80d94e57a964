"""The training and evaluation steps of classification, for tests that bring a model of their own."""

import dataclasses

import optax
from flax import nnx

from crossvit_jax import CrossViT, CrossViTConfig
from crossvit_jax.config import VARIANTS
from train.config import TrainConfig
from train.devices.mesh import state_shardings
from train.optim import step
from train.optim.state import State, abstract_model, abstract_state, lower_init
from train.tasks.classification import Classification


def classification(config: TrainConfig, classes: int) -> Classification:
    """The task, of the variant that the settings ask for, or where they ask for none that they can make, of ti."""
    names = tuple(map(str, range(classes)))
    return Classification(config, config.model_config(classes), names)


def _of(model: nnx.Module, config: TrainConfig) -> Classification:
    return Classification(config, dataclasses.replace(VARIANTS["ti"], num_classes=model.num_classes), ())


def make_train_step(model: nnx.Module, optimizer: optax.GradientTransformation, config: TrainConfig):
    """The step of a model with `num_classes`, see `train.optim.step.make_train_step`."""
    return step.make_train_step(model, _of(model, config), optimizer, config)


def make_eval_step(model: nnx.Module):
    """The evaluation step of a model with `num_classes`, see `train.optim.step.make_eval_step`."""
    return step.make_eval_step(model, _of(model, TrainConfig()))


def init_state(config: TrainConfig, classes: int, optimizer: optax.GradientTransformation, mesh, params=None) -> State:
    """A new training state, made where it will live."""
    task = classification(config, classes)
    model = abstract_model(task, config)
    shardings = state_shardings(abstract_state(model, optimizer, config, task), mesh)
    return lower_init(task, model, optimizer, config, mesh, shardings, params)()


def abstract_classifier(model_config: CrossViTConfig, config: TrainConfig | None = None) -> CrossViT:
    """A model with shapes instead of arrays."""
    config = config or TrainConfig()
    return abstract_model(Classification(config, model_config, ()), config)
