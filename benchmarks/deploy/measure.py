"""The shipped forms of a model in turn: compared with their weights in float32 first, then timed."""

import argparse
import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int

from benchmarks.command import given_data
from benchmarks.deploy.forms import FLOAT_FILE, REFERENCE, float_forms, qat_forms
from benchmarks.deploy.runs import Run, open_run, pair, read_images
from benchmarks.result import Content, as_json
from benchmarks.rounds import Measured, measure, not_failed, say
from benchmarks.task import DeployTask, Form
from convert.export.compare import compare
from convert.export.onnx_graph import run_torch
from convert.weights import Weights

BATCHES = (1, 8)
_CHECKED_ONE_BY_ONE = 16  # images; all of them in the larger batches

Logits = Float32[np.ndarray, "images classes"]


def measured_models(args: argparse.Namespace) -> Iterator[Content]:
    """Opens the runs that the flags name and measures the forms of each: the JSON content after each model."""
    models, measured = pair([open_run(source, given_data(args)) for source in args.runs]), []
    for number, (plain, qat) in enumerate(models, 1):
        say(f"CrossViT {plain.weights.config.name} of {plain.source}, {number} of {len(models)}")
        with tempfile.TemporaryDirectory(prefix="crossvit-deploy-") as folder:
            measured += _measure_model(plain, qat, Path(folder), args)
        yield as_json("deploy", measured)


def _measure_model(plain: Run, qat: Run | None, folder: Path, args: argparse.Namespace) -> list[Measured]:
    """Makes all forms of a model in a folder, tries them on held-out images, and times them."""
    data, config, file = plain.data, plain.weights.config, folder / "images.npy"
    say("reading images")
    calibration, *_ = read_images(data.sets.train, args.calibration_images, plain.weights, folder / "calibration.npy")
    tried, labels, unreadable = read_images(data.images, args.images, plain.weights, file)
    channels_first = calibration.transpose(0, 3, 1, 2)
    forms, weights = float_forms(plain.weights, folder, channels_first), {False: plain.weights}
    if qat is not None:
        forms |= qat_forms(qat.weights, folder, channels_first)
        weights[True] = qat.weights
    about = {"run": plain.source, "qat_run": qat and qat.source, "variant": config.name}
    about |= {"image_size": list(config.image_size), "classes": config.num_classes, "dataset": data.dataset}
    about |= {"held_out_split": data.split, "held_out_images": len(data.images), "images": len(tried)}
    about |= {"unreadable_images": unreadable, "calibration_images": len(calibration)}
    task = DeployTask(about=about, forms=forms, images=str(file), checked=len(tried), batch_size=max(BATCHES))
    return measure_forms(task, weights, plain.outputs[labels], rounds=args.repeats)


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


def _told(name: str, forms: Mapping[str, Form], top1: Mapping[str, float]) -> dict[str, Any]:
    """A form that gave no logits has no accuracy; points are how much higher it is than that of the float32 weights."""
    form, float_file, told = forms[name], forms.get(FLOAT_FILE), {"top1": top1.get(name)}
    told |= {"percent_of_onnx_float32": float_file and 100 * form.bytes / float_file.bytes}
    if name != REFERENCE and {name, REFERENCE} <= top1.keys():
        told |= {"points_from_float32": top1[name] - top1[REFERENCE]}
    return told | {name: getattr(form, name) for name in ("runs_in", "dtype", "qat", "bytes")}


def _logits(weights: Weights, task: DeployTask) -> Logits:
    run = run_torch(weights)
    return np.concatenate([run(batch) for batch in task.batches()])[: task.checked]
