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

    def share(self, form: str) -> float | None:
        """Its size in percent of the ONNX file in float32, if there is one."""
        return 100 * self.forms[form].size / self.forms[FLOAT_FILE].size if FLOAT_FILE in self.forms else None

    def top1(self, form: str) -> float | None:
        """In percent; None for a form that gave no logits."""
        return 100 * self.right[form] / self.images if form in self.right else None

    def points(self, form: str) -> float | None:
        """How much higher its top-1 is than that of the float32 weights."""
        known = form in self.right and REFERENCE in self.right
        return 100 * (self.right[form] - self.right[REFERENCE]) / self.images if known else None

    @property
    def others(self) -> float | None:
        """Cores that other programs kept busy, at the worse of the batch sizes."""
        known = [cores_of_others(measured.sides) for measured in self.measured]
        return max((cores for cores in known if cores is not None), default=None)


def as_json(results: Sequence[Deployed]) -> dict[str, Any]:
    """Everything measured, with every round, in plain types."""
    every = (times for result in results for measured in result.measured for times in measured.sides.values())
    return about("deploy", told_facts(every)) | {
        "results": [
            {
                "run": result.model.run.source,
                "qat_run": result.model.qat and result.model.qat.source,
                "variant": result.model.config.name,
                "image_size": result.model.config.image_size,
                "classes": result.model.config.num_classes,
                "dataset": result.model.run.settings.dataset,
                "held_out_split": result.model.sets.held_out_split,
                "held_out_images": len(result.model.sets.held_out),
                "images": result.images,
                "unreadable_images": result.unreadable,
                "calibration_images": result.calibrated_on,
                "others_cores": result.others,
                "compared_with": REFERENCE,
                "forms": {
                    name: {
                        "runs_in": form.runs_in,
                        "dtype": form.dtype,
                        "qat": form.qat,
                        "bytes": form.size,
                        "percent_of_onnx_float32": result.share(name),
                        "top1": result.top1(name),
                        "points_from_float32": result.points(name),
                        "batches": {str(m.batch_size): _side(m, name) for m in result.measured},
                    }
                    for name, form in result.forms.items()
                },
            }
            for result in results
        ],
    }


def _side(measured: Measured, name: str) -> dict[str, Any]:
    times = measured.sides[name]
    known = side_as_json(times, measured.batch_size)
    if name in measured.distances:
        distance = measured.distances[name]
        known |= {"difference": distance.value, "difference_of": distance.kind, "bound": distance.bound}
    if times.failure is None:
        torch = measured.sides[REFERENCE]
        ratio = times_as_fast(times.seconds, torch.seconds) if torch.failure is None else None
        known["times_as_fast_as_torch"] = ratio
    return known
