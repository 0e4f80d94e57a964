"""The training state of a checkpoint of torch (`convert.training`) as one of a run here."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from convert.errors import ConversionError, SettingsError, listed
from convert.training.state import TrainingState
from convert.training.torch_checkpoint import read_torch_checkpoint
from convert.tree import flatten, nest
from crossvit_jax.config import Branch
from train.config import TrainConfig
from train.devices.mesh import put
from train.optim.schedule import learning_rate
from train.optim.state import State

_LR_TOLERANCE = 1e-6  # relative
_KNOWN = (optax.ScaleByAdamState, optax.TraceState, optax.ScaleByScheduleState)


def read_carried(config: TrainConfig) -> TrainingState:
    """The training state in `config.resume`. Raises SettingsError if there is none that the run could go on with."""
    branches = config.branches and tuple(map(Branch.parse, config.branches))
    try:
        return read_torch_checkpoint(Path(config.resume), branches)
    except ConversionError as error:
        raise SettingsError(f"--resume {error}") from None
    except OSError as error:
        raise SettingsError(f"--resume {config.resume} cannot be read: {error.strerror}") from None


def check_carried(carried: TrainingState, config: TrainConfig, *, steps_per_epoch: int) -> list[str]:
    """Notes on what goes on otherwise than in the program that the state comes from, and on what is not carried over.

    Raises SettingsError if the settings are of another optimiser or have no epoch left, or parameters have no moments.
    """
    rule, what = carried.rule, f"--resume {config.resume}"
    if rule.optimizer != config.optimizer:
        raise SettingsError(f"{what} has the state of {rule.optimizer}, not of {config.optimizer}: --optimizer")
    if carried.epochs > config.epochs:
        raise SettingsError(f"{what} has done {carried.epochs} epochs, and --epochs is {config.epochs}")
    if not config.freeze_backbone:  # with it, `carry` looks at the heads
        for moment in carried.moments if rule.momentum != 0 else ():
            _check_moments(moment, carried.moments[moment], carried.weights.tensors)
    step = carried.epochs * steps_per_epoch
    pairs = {
        "a weight decay of": (rule.weight_decay, config.weight_decay),
        "a momentum of": (rule.momentum or 0.0, config.momentum if rule.momentum is not None else 0.0),
        "decay of tokens and position embeddings:": (
            config.decay_tokens if rule.decay_tokens is None else rule.decay_tokens,
            config.decay_tokens,
        ),
    }
    notes = [f"it had {name} {there}, this run has {here}" for name, (there, here) in pairs.items() if there != here]
    notes += _lr_note(carried, config, step, steps_per_epoch)
    if carried.updates not in (None, step):
        notes.append(
            f"its {carried.updates} updates in {carried.epochs} epochs are {step} steps here, of {steps_per_epoch} in "
            "an epoch: the schedule goes by the epochs"
        )
    if carried.average is not None and not config.ema_decay:
        notes.append("its average of the weights is left out: --ema-decay would go on with it")
    if carried.average is None and config.ema_decay:
        notes.append("it has no average of the weights: that begins with its weights")
    started = f"it goes on after epoch {carried.epochs} of {config.epochs}, step {step}"
    return [*carried.notes, *notes, f"{started}; the order of the images and all that is drawn are this program's own"]


def _lr_note(carried: TrainingState, config: TrainConfig, step: int, steps_per_epoch: int) -> list[str]:
    """A note where the learning rate is neither that of the last step here nor that of the next."""
    around = range(max(0, step - 1), min(step, config.epochs * steps_per_epoch - 1) + 1)
    rates = [learning_rate(config, at, steps_per_epoch=steps_per_epoch) for at in around]
    if any(abs(carried.rule.lr - rate) <= _LR_TOLERANCE * rate for rate in rates):
        return []
    return [f"its learning rate was {carried.rule.lr:.4g}, that of this run's schedule is {rates[-1]:.4g} there"]


def carry(state: State, carried: TrainingState, *, step: int) -> State:
    """A new state around the carried weights, with their moments, their average and the steps in place of its own.

    Args:
        state: on the devices. Without an average in `carried`, its own remains.
        step: steps of the run that are done.

    Raises SettingsError if a parameter that is trained here has no moments.
    """
    moments = carried.moments

    def filled(part: Any) -> Any:
        if isinstance(part, optax.ScaleByAdamState):
            count = _like(part.count, carried.updates or 0)
            return part._replace(count=count, mu=_moment(part.mu, "exp_avg"), nu=_moment(part.nu, "exp_avg_sq"))
        if isinstance(part, optax.TraceState):
            # torch's SGD without momentum keeps nothing
            return part if carried.rule.momentum == 0 else part._replace(trace=_moment(part.trace, "momentum_buffer"))
        return part._replace(count=_like(part.count, step)) if isinstance(part, optax.ScaleByScheduleState) else part

    def _moment(tree: Any, moment: str) -> Any:
        wanted = flatten(tree)
        _check_moments(moment, moments[moment], wanted)
        return _like(tree, nest({name: moments[moment][name] for name in wanted}))

    opt = jax.tree.map(filled, state["opt"], is_leaf=lambda part: isinstance(part, _KNOWN))
    average = {} if carried.average is None or "ema" not in state else {"ema": nest(carried.average)}
    average = {name: _like(state[name], tree) for name, tree in average.items()}
    scale = state.get("loss_scale")  # a new one, but no step is the first any more
    scaled = {} if scale is None else {"loss_scale": scale._replace(updates=_like(scale.updates, step))}
    return {**state, **average, **scaled, "opt": opt, "step": _like(state["step"], step)}


def _check_moments(moment: str, held: Mapping[str, Any], wanted: Iterable[str]) -> None:
    missing = [name for name in wanted if name not in held]
    if missing:
        names = listed(missing[:3], len(missing))
        raise SettingsError(f"the checkpoint to go on from has no {moment} of {names}: they were not trained there")


def _like(placed: Any, tree: Any) -> Any:
    """Host arrays in the dtypes of arrays on the devices, and where these lie."""
    tree = jax.tree.map(lambda old, new: np.asarray(new, old.dtype), placed, tree)
    return put(tree, jax.tree.map(lambda array: array.sharding, placed))
