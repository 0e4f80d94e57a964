"""`--init`: the weights that a run starts from, made to fit its images and classes."""

import dataclasses

from convert import ConversionError, load_weights
from convert.adapt import adapt
from convert.errors import SettingsError
from convert.weights import Weights
from crossvit_jax import get_config
from train.config import TrainConfig


def initial_weights(config: TrainConfig, class_names: tuple[str, ...]) -> Weights:
    """The weights of `config.init` for the classes of a data set and the settings of a run; changes are in `notes`.

    The head is kept if it is known to be, or may be, for these very classes. Position embeddings are resampled for
    another image size.

    Raises SettingsError if they cannot be read, are of another variant than asked for, or cannot be adapted.
    """
    try:
        weights = load_weights(config.init)
        if config.variant is not None and get_config(config.variant).name != weights.config.name:
            raise SettingsError(f"--init {config.init} holds {weights.config.name}, not the variant {config.variant}")
        weights, notes = _fit_classes(weights, class_names, seed=config.seed)
        weights = adapt(weights, config.model_overrides(), seed=config.seed)
    except (ConversionError, ValueError) as error:
        raise SettingsError(str(error)) from error
    if weights.non_finite():
        raise SettingsError(f"--init {config.init}: {weights.non_finite()}")
    return dataclasses.replace(weights, notes=(*weights.notes, *notes))


def _fit_classes(weights: Weights, class_names: tuple[str, ...], *, seed: int) -> tuple[Weights, list[str]]:
    count = len(class_names)
    if weights.config.num_classes != count:
        return adapt(weights, {"num_classes": count}, seed=seed), []
    if weights.class_names is None:
        return weights, [f"the head is kept: it has {count} classes too, and their names are not known"]
    if weights.class_names == class_names:
        return weights, ["the head is kept: it is for these classes"]
    # by way of no head at all: the number alone would not tell that it must go
    fresh = adapt(adapt(weights, {"num_classes": 0}), {"num_classes": count}, seed=seed)
    note = f"new head: the {count} classes are others than those of the weights"
    return dataclasses.replace(fresh, notes=weights.notes), [note]
