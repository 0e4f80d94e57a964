"""What was measured of the shipped forms of a model, and the same as JSON."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.deploy.forms import FLOAT_FILE, REFERENCE
from benchmarks.deploy.measure import Measured
from benchmarks.deploy.runs import Model
from benchmarks.result import about, side_as_json, times_as_fast, told_facts
from benchmarks.rounds import cores_of_others
from benchmarks.task import Form


@dataclass(frozen=True, kw_only=True)
class Deployed:
    """What is known of a model's forms."""

    model: Model
    forms: dict[str, Form]
    measured: list[Measured]  # at batch 1, and at batch 8
    right: dict[str, int]  # held-out images that a form classifies rightly
    images: int  # held out, and read
    unreadable: int
    calibrated_on: int  # training images


def as_json(results: Sequence[Deployed]) -> dict[str, Any]:
    """Everything measured, with every round, in plain types."""
    every = (times for result in results for measured in result.measured for times in measured.sides.values())
    return about("deploy", told_facts(every)) | {"results": [_result(result) for result in results]}


def _result(result: Deployed) -> dict[str, Any]:
    model = result.model
    others = [cores_of_others(measured.sides) for measured in result.measured]
    return {
        "run": model.run.source,
        "qat_run": model.qat and model.qat.source,
        "variant": model.config.name,
        "image_size": model.config.image_size,
        "classes": model.config.num_classes,
        "dataset": model.run.settings.dataset,
        "held_out_split": model.sets.held_out_split,
        "held_out_images": len(model.sets.held_out),
        "images": result.images,
        "unreadable_images": result.unreadable,
        "calibration_images": result.calibrated_on,
        "others_cores": max((cores for cores in others if cores is not None), default=None),
        "compared_with": REFERENCE,
        "forms": {name: _form(result, name) for name in result.forms},
    }


def _form(result: Deployed, name: str) -> dict[str, Any]:
    """A form that gave no logits has no accuracy; points are how much higher it is than that of the float32 weights."""
    form, float_file = result.forms[name], result.forms.get(FLOAT_FILE)
    top1 = {side: 100 * right / result.images for side, right in result.right.items()}
    return {
        "runs_in": form.runs_in,
        "dtype": form.dtype,
        "qat": form.qat,
        "bytes": form.size,
        "percent_of_onnx_float32": float_file and 100 * form.size / float_file.size,
        "top1": top1.get(name),
        "points_from_float32": top1[name] - top1[REFERENCE] if {name, REFERENCE} <= top1.keys() else None,
        "batches": {str(measured.batch_size): _side(measured, name) for measured in result.measured},
    }


def _side(measured: Measured, name: str) -> dict[str, Any]:
    times = measured.sides[name]
    known = side_as_json(times, measured.batch_size)
    if name in measured.distances:
        distance = measured.distances[name]
        known |= {"difference_of": distance.kind, "bound": distance.bound}
    if times.failure is None:
        torch = measured.sides[REFERENCE]
        ratio = times_as_fast(times.seconds, torch.seconds) if torch.failure is None else None
        known["times_as_fast_as_torch"] = ratio
    return known
