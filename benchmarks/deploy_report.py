"""The shipped forms of models as Markdown for people and as JSON for everything else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.deploy_forms import FLOAT_FILE, REFERENCE
from benchmarks.deploy_measure import BATCHES, Measured
from benchmarks.deploy_runs import Model
from benchmarks.machine import about, where
from benchmarks.ratios import rounds, spread, times_as_fast
from benchmarks.rounds import ACCEPTED_OTHERS, cores_of_others
from benchmarks.task import Form

_FASTER = "times as fast as torch (min-max)"
_SHARE = f"% of {FLOAT_FILE}"
_HEADER = [
    "form",
    "MB",
    _SHARE,
    "batch 1: ms",
    _FASTER,
    "batch 8: images/s",
    _FASTER,
    "top-1, %",
    "points",
    "logits differ by",
]


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
    return about("deploy", _software(results)) | {
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


def as_markdown(content: Mapping[str, Any]) -> str:
    """For each model, a line on what was measured and a table with a row per form; at the end a line on the machine.

    From what `as_json` gives.
    """
    lines = []
    for result in content["results"]:
        held_out = f"{result['held_out_images']} held-out images ({result['held_out_split']})"
        unreadable = f", {result['unreadable_images']} more could not be read" if result["unreadable_images"] else ""
        lines += [
            f"CrossViT {result['variant']} at {' x '.join(map(str, result['image_size']))} pixels, {result['run']}; "
            f"top-1 on {result['images']} of {held_out}{unreadable}; static int8 calibrated on "
            f"{result['calibration_images']} training images",
            "",
            _row(_HEADER),
            _row("---" for _ in _HEADER),
            *(_row(_cells(result, name)) for name in result["forms"]),
            "",
            *(f"{failure}\n" for failure in failures(result)),
        ]
        if result["others_cores"] is not None and result["others_cores"] > ACCEPTED_OTHERS:
            busy = f"{result['others_cores']:.1f}"
            lines += [f"**Times not valid**: other programs kept {busy} cores busy meanwhile.", ""]
    lines.append(
        "Points: how far top-1 is above that of float32. Logits: the largest difference, for int8 the root mean square "
        f"one. {where(content)}"
    )
    return "\n".join(lines)


def failures(result: Mapping[str, Any]) -> list[str]:
    """What went wrong, with the form's name and batch size."""
    return [
        f"{name} at batch {batch_size}: {batch['failure']}"
        for batch_size in map(str, BATCHES)
        for name, form in result["forms"].items()
        if (batch := form["batches"][batch_size])["failure"] is not None
    ]


def _cells(result: Mapping[str, Any], name: str) -> list[str]:
    form, forms, reference = result["forms"][name], result["forms"], result["compared_with"]
    cells = [name, f"{form['bytes'] / 1e6:.1f}{' in memory' if form['runs_in'] == 'qwix' else ''}"]
    cells.append(_number(form["percent_of_onnx_float32"], ".1f"))
    for batch_size in BATCHES:
        batch = form["batches"][str(batch_size)]
        if batch["failure"] is not None:
            cells += ["failed", ""]
            continue
        seconds = batch["median_s_per_call"]
        cells.append(f"{1000 * seconds:.2f}" if batch_size == 1 else f"{batch_size / seconds:.1f}")
        timed = rounds({"sides": {side: known["batches"][str(batch_size)] for side, known in forms.items()}})
        beside = name != reference and reference in timed
        ratio = "{ratio:.2f} ({min:.2f}-{max:.2f})"
        cells.append(ratio.format(**times_as_fast(timed[name], timed[reference])) if beside else "")
    cells += [_number(form["top1"], ".2f"), "" if name == reference else _number(form["points_from_float32"], "+.2f")]
    far = [(batch["difference"], batch["difference_of"]) for batch in form["batches"].values() if "difference" in batch]
    return [*cells, "{:.1e} of the {}".format(*max(far)) if far else ""]


def _number(value: float | None, as_text: str) -> str:
    return "" if value is None else format(value, as_text)


def _side(measured: Measured, name: str) -> dict[str, Any]:
    times = measured.sides[name]
    known: dict[str, Any] = {"failure": times.failure}
    if name in measured.distances:
        distance = measured.distances[name]
        known |= {"difference": distance.value, "difference_of": distance.kind, "bound": distance.bound}
    if times.ready:
        ready = times.ready
        known |= {"load_s": ready.load_s, "first_result_s": ready.first_s, "calls_per_round": ready.calls}
        known |= {"rounds_s_per_call": times.seconds, "others_cores": [turn.others for turn in times.rounds]}
    if times.failure is None:
        known |= {f"{key}_s_per_call": value for key, value in spread(times.seconds).items()}
        known["images_per_s"] = measured.batch_size / times.median
        torch = measured.sides[REFERENCE]
        ratio = times_as_fast(times.seconds, torch.seconds) if torch.failure is None else None
        known["times_as_fast_as_torch"] = ratio
    return known


def _software(results: Sequence[Deployed]) -> dict[str, str]:
    """Versions and threads, as the sides told them."""
    facts: dict[str, str] = {}
    for result in results:
        for measured in result.measured:
            for times in measured.sides.values():
                facts |= times.ready.facts if times.ready else {}
    return facts


def _row(cells) -> str:
    return f"| {' | '.join(cells)} |"
