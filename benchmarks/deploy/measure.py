"""The shipped forms of a model in turn: compared with their weights in float32 first, then timed."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int

from benchmarks.deploy.forms import FLOAT_FILE, REFERENCE, float_forms, qat_forms
from benchmarks.deploy.runs import Model, read_images
from benchmarks.rounds import Measured, measure, not_failed, say
from benchmarks.task import DeployTask, Form
from convert.export.compare import compare
from convert.export.onnx_graph import run_torch
from convert.weights import Weights

BATCHES = (1, 8)
_CHECKED_ONE_BY_ONE = 16  # images; all of them in the larger batches

Logits = Float32[np.ndarray, "images classes"]


def measure_model(model: Model, folder: Path, *, images: int, calibration_images: int, rounds: int) -> list[Measured]:
    """Makes all forms of a model in a folder, tries them on so many held-out images at most, and times them.

    Raises ConversionError, SettingsError or DataError, see `float_forms` and `read_images`.
    """
    run, sets, config = model.run, model.sets, model.run.weights.config
    say("reading images")
    calibration, *_ = read_images(sets.train, calibration_images, run.weights, folder / "calibration.npy")
    tried, labels, unreadable = read_images(sets.held_out, images, run.weights, folder / "images.npy")
    channels_first = calibration.transpose(0, 3, 1, 2)
    forms, weights = float_forms(run.weights, folder, channels_first), {False: run.weights}
    if model.qat is not None:
        forms |= qat_forms(model.qat.weights, folder, channels_first)
        weights[True] = model.qat.weights
    about = {"run": run.source, "qat_run": model.qat and model.qat.source, "variant": config.name}
    about |= {"image_size": list(config.image_size), "classes": config.num_classes, "dataset": run.settings.dataset}
    about |= {"held_out_split": sets.held_out_split, "held_out_images": len(sets.held_out), "images": len(tried)}
    about |= {"unreadable_images": unreadable, "calibration_images": len(calibration)}
    file = str(folder / "images.npy")
    task = DeployTask(about=about, forms=forms, images=file, checked=len(tried), batch_size=max(BATCHES))
    return measure_forms(task, weights, model.classes[labels], rounds=rounds)


def measure_forms(
    task: DeployTask, weights: Mapping[bool, Weights], labels: Int[np.ndarray, " images"], *, rounds: int
) -> list[Measured]:
    """Times all forms at each of `BATCHES`, once their logits are within the converters' bounds of the `weights`, which
    are by `Form.qat`. A form that fails, or is not within them, is left out of the rest; its `Times.failure` says why.

    Args:
        task: at the largest batch.
        labels: the outputs that are right.
    """
    say(f"classifying {task.checked} images with the weights in float32")
    expected = {qat: _logits(these, task) for qat, these in weights.items()}
    found = {}
    for batch_size in reversed(BATCHES):  # the larger batch first: there all images are classified
        checked = task.checked if batch_size == task.batch_size else min(task.checked, _CHECKED_ONE_BY_ONE)
        say(f"batch {batch_size}: each form classifies {checked} images before it is timed")
        at_size = dataclasses.replace(task, batch_size=batch_size, checked=checked)
        how = {"environment": {"JAX_PLATFORMS": "cpu"}, "compare": lambda measured: _compare(measured, expected)}
        found[batch_size] = measure(at_size, list(task.forms), rounds=rounds, **how)
    ready = {name: times.ready for name, times in found[task.batch_size].sides.items() if times.ready}
    top1 = {name: 100 * float(np.mean(one.check["logits"].argmax(axis=1) == labels)) for name, one in ready.items()}
    for measured in found.values():
        for name, times in measured.sides.items():
            times.more |= _told(name, task.forms, top1)
    return [found[batch_size] for batch_size in BATCHES]


def _compare(measured: Measured, expected: Mapping[bool, Logits]) -> None:
    """Fills in the differences, and failures where they are too large."""
    for name, times in not_failed(measured.sides).items():
        got, form = times.ready.check["logits"], measured.task.forms[name]
        distance = compare(got, expected[form.qat][: len(got)], form.dtype)
        times.difference = distance.value
        times.more |= {"difference_of": distance.kind, "bound": distance.bound}
        if not distance.passed:
            off = f"{distance.value:.1e} of the {distance.kind}"
            times.failure = f"its logits are off by {off}, the bound is {distance.bound:g}: not timed"


def _told(name: str, forms: Mapping[str, Form], top1: Mapping[str, float]) -> dict[str, object]:
    """A form that gave no logits has no accuracy; points are how much higher it is than that of the float32 weights."""
    form, float_file = forms[name], forms.get(FLOAT_FILE)
    others = name != REFERENCE and {name, REFERENCE} <= top1.keys()
    return {
        "runs_in": form.runs_in,
        "dtype": form.dtype,
        "qat": form.qat,
        "bytes": form.bytes,
        "percent_of_onnx_float32": float_file and 100 * form.bytes / float_file.bytes,
        "top1": top1.get(name),
        "points_from_float32": top1[name] - top1[REFERENCE] if others else None,
    }


def _logits(weights: Weights, task: DeployTask) -> Logits:
    run = run_torch(weights)
    return np.concatenate([run(batch) for batch in task.batches()])[: task.checked]
