"""The training state in the folder of a run: its newest Orbax checkpoint, read as numpy arrays."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert import architecture, metadata
from convert.errors import ConversionError, one_line
from convert.formats.run_folder import newest_checkpoint, read_description, read_progress, read_state
from convert.training.state import MOST, Rule, TrainingState
from convert.tree import flatten, shapes_of
from convert.weights import Weights
from crossvit_jax.config import shown_value
from crossvit_jax.files import read_json

_CONFIG = "config.json"


def read_run_checkpoint(folder: Path, step: Path | None = None) -> TrainingState:
    """The training state of a run at a checkpoint: the newest, where none is named.

    Raises:
        ConversionError: there is no run or no checkpoint in the folder, it is damaged, or torch has no counterpart.
    """
    try:
        about = read_json(folder / _CONFIG)
        settings, data = about["train"], about["data"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConversionError(f"{folder} is not the folder of a training run: --training reads no other") from None
    _check(settings, data, folder / _CONFIG)
    _refuse(settings, folder)
    step = step or newest_checkpoint(folder)
    tree = read_state(step)
    config, class_names = metadata.understand(read_description(step))
    try:
        progress = read_progress(step)
        tensors = flatten(tree["params"])
        architecture.check(shapes_of(tensors), config, str(step))
        moments, updates = _moments(tree["opt"], settings["optimizer"])
        done = int(tree["step"])
        peak = settings["lr"] * settings["batch_size"] / settings["lr_batch_size"]
        rule = Rule(
            optimizer=settings["optimizer"],
            lr=peak if progress.get("lr") is None else progress["lr"],
            peak_lr=peak,
            weight_decay=settings["weight_decay"],
            momentum=settings["momentum"] if settings["optimizer"] == "sgd" else None,
            decay_tokens=settings["decay_tokens"],
        )
        notes = _notes(settings, done, data["steps_per_epoch"])
        return TrainingState(
            weights=Weights(config=config, tensors=tensors, class_names=class_names),
            average=flatten(tree["ema"]) if "ema" in tree else None,
            moments=moments,
            updates=updates,
            epochs=done // data["steps_per_epoch"],
            rule=rule,
            notes=notes,
        )
    except ConversionError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ConversionError(f"{step} is a damaged checkpoint: {one_line(error)}") from None


def _check(settings: Any, data: Any, file: Path) -> None:
    """Raises ConversionError for settings that are none: anybody may have written them."""
    if not isinstance(settings, Mapping) or not isinstance(data, Mapping):
        raise ConversionError(f"{file} is damaged: it has no settings of a run")
    for held, name, least, kind in (
        (data, "steps_per_epoch", 1, int),
        (settings, "batch_size", 1, int),
        (settings, "lr_batch_size", 1, int),
        (settings, "lr", 0, int | float),
        (settings, "weight_decay", 0, int | float),
        (settings, "momentum", 0, int | float),
        ({"layer_decay": 1} | settings, "layer_decay", 0, int | float),
    ):
        value = held.get(name)
        if not isinstance(value, kind) or isinstance(value, bool) or not least <= value < MOST:
            kind_told = "whole number" if kind is int else "number"
            raise ConversionError(f"{file}: {name} must be a {kind_told}, {least} or more; got {shown_value(value)}")


def _refuse(settings: Mapping[str, Any], folder: Path) -> None:
    """Raises ConversionError for settings that no optimiser of timm's goes on with."""
    task = settings.get("task", "classification")
    if task != "classification":
        raise ConversionError(f"the run in {folder} learns {task}, which timm does not: convert its weights alone")
    if settings.get("layer_decay", 1) < 1:
        raise ConversionError(
            f"the run in {folder} has a layer_decay of {settings['layer_decay']}: timm's layers are others than here"
        )
    if settings.get("freeze_backbone"):
        raise ConversionError(f"the run in {folder} trains its heads alone (freeze_backbone): timm trains all")


def _notes(settings: Mapping[str, Any], step: int, steps_per_epoch: int) -> tuple[str, ...]:
    notes = []
    if step % steps_per_epoch:
        epoch = step // steps_per_epoch
        notes.append(f"step {step} is within epoch {epoch + 1}: timm begins that epoch anew")
    if settings.get("decay_tokens") and settings["weight_decay"]:
        notes.append("the run lets class tokens and position embeddings decay, timm does not")
    if settings.get("distill"):
        notes.append("timm goes on without the teacher of --distill")
    if settings.get("qat"):
        notes.append(f"timm goes on without rounding weights to {settings['qat']}")
    notes.append("not in it: the order of the images, the augmentation's random numbers, and timm's own settings")
    return tuple(notes)


def _moments(opt: Any, optimizer: str) -> tuple[dict[str, dict[str, np.ndarray]], int | None]:
    """The moments in optax's state, which is nested dicts and lists here, and how often they were updated."""
    for part in _dicts(opt):
        if optimizer == "adamw" and {"count", "mu", "nu"} <= part.keys():
            return {"exp_avg": flatten(part["mu"]), "exp_avg_sq": flatten(part["nu"])}, int(part["count"])
        if optimizer == "sgd" and "trace" in part:
            return {"momentum_buffer": flatten(part["trace"])}, None
    raise ConversionError(f"the checkpoint has no state of {optimizer}")


def _dicts(tree: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(tree, Mapping):
        yield tree
    below = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, list | tuple) else ()
    for part in below:
        yield from _dicts(part)
