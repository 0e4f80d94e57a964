"""The weights that a pre-training starts from, and those that it leaves."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import convert
from convert import load_weights
from convert.changes.adapt import adapt
from convert.changes.dense import body_of
from convert.errors import ConversionError, SettingsError
from convert.tree import flatten
from convert.weights import Weights
from crossvit_jax.config import CrossViTConfig, get_config
from crossvit_jax.config.masking import cell_grid, masked_cells
from crossvit_jax.pretraining.dino import DinoCrossViT
from crossvit_jax.pretraining.masked import BODY, MaskedCrossViT
from train.config import TrainConfig

HEAD = {"hidden": 2048, "bottleneck": 256}  # the widths of DINO's head


def save_body(params: Any, model: CrossViTConfig, path: Path, config: TrainConfig, origin: str | None) -> None:
    """Writes the CrossViT alone of the parameters of a pre-training, and says in the file that it is alone.

    Args:
        origin: what is said of it beside that.
    """
    rest = ", ".join(sorted({str(name) for name in params} - {BODY.rstrip(".")}))
    told = f"pre-trained by {config.method}, and left out of it: {rest}"
    origin = told if origin is None else f"{origin}; {told}"
    convert.save(params["body"], model, path, exif=config.exif, origin=origin, overwrite=True)


def starting_model(
    config: TrainConfig, begun: CrossViTConfig | None, *, starts_anew: bool
) -> tuple[CrossViTConfig, Weights | None]:
    """The model of a run, and the weights of `config.init` where it starts from them; what stands on them is new.

    Args:
        begun: the model of the run that is continued; none: it is a new one.
        starts_anew: there is no checkpoint to continue from.

    Raises SettingsError if the settings make no model, the weights are not for such a one, or cells or small crops do
    not fit it.
    """
    weights = None
    try:
        if starts_anew and config.init is not None:
            weights = _initial_weights(config)
            model = weights.config
        elif begun is not None:
            name = begun.name if config.variant in (None, begun.name) else get_config(config.variant).name
            model = begun.replace(name=name, **config.model_overrides())
        else:
            model = config.model_config(num_classes=0)
    except (ConversionError, ValueError) as error:
        raise SettingsError(str(error)) from error
    for name, check in _checks(config, model).items():
        try:
            check()
        except ValueError as error:
            raise SettingsError(f"{name}: {error}") from None
    return model, weights


def _checks(config: TrainConfig, model: CrossViTConfig) -> dict[str, Callable[[], Any]]:
    """What raises ValueError if a setting does not fit the model, by the names of the settings."""
    if config.method == "dino":
        height, width = model.image_size
        return {
            "method dino sees images at half their side": lambda: model.replace(image_size=(height // 2, width // 2))
        }
    return {
        "mask_cell": lambda: cell_grid(model, config.mask_cell),
        "mask_ratio": lambda: masked_cells(cell_grid(model, config.mask_cell), config.mask_ratio),
    }


def _initial_weights(config: TrainConfig) -> Weights:
    overrides = config.model_overrides()
    weights = load_weights(config.init, **({"branches": overrides["branches"]} if config.branches else {}))
    held = weights.config.name
    if config.variant not in (None, held) and get_config(config.variant).name != held:
        raise SettingsError(f"--init {config.init} holds {held}, not the variant {config.variant}")
    weights = adapt(body_of(weights), {"in_chans": 3, **overrides}, seed=config.seed)  # runs read colour images
    if weights.non_finite():
        raise SettingsError(f"--init {config.init}: {weights.non_finite()}")
    prototypes = config.prototypes if config.method == "dino" else None
    fresh = dict(flatten(_draw(weights.config, config.seed, prototypes)))
    note = f"new for pre-training: {', '.join(sorted({name.split('.')[0] for name in fresh}))}"
    tensors = {f"{BODY}{name}": array.astype(np.float32) for name, array in weights.tensors.items()} | fresh
    return dataclasses.replace(weights, tensors=tensors, notes=(*weights.notes, note))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))  # which leaves out what is not returned: the body is not drawn
def _draw(config: CrossViTConfig, seed: int, prototypes: int | None) -> dict[str, Any]:
    """What stands on the body; with `prototypes` DINO's head."""
    rngs = nnx.Rngs(seed)
    model = (
        MaskedCrossViT(config, rngs=rngs) if prototypes is None else DinoCrossViT(config, prototypes, **HEAD, rngs=rngs)
    )
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return {name: part for name, part in params.items() if name != BODY.rstrip(".")}
