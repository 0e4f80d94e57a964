"""The shipped forms of a model in turn: compared with their weights in float32 first, then timed."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from benchmarks.rounds import Times, not_failed, say, take_turns
from benchmarks.task import DeployTask, Form
from convert.export.compare import Comparison, compare
from convert.export.onnx_graph import run_torch
from convert.weights import Weights

BATCHES = (1, 8)
_CHECKED_ONE_BY_ONE = 16  # images; all of them in the larger batches

Logits = Float32[np.ndarray, "images classes"]


@dataclass
class Measured:
    """All sides at one batch size."""

    batch_size: int
    sides: dict[str, Times]
    distances: dict[str, Comparison] = field(default_factory=dict)  # of those that gave logits


def measure_forms(
    forms: Mapping[str, Form], weights: Mapping[bool, Weights], images: Path, count: int, *, rounds: int
) -> tuple[list[Measured], dict[str, Logits]]:
    """Times all forms at each of `BATCHES`, once their logits are within the converters' bounds.

    A form that fails, or whose logits are not within them, is left out of the rest; its `Times.failure` says why.

    Args:
        forms: by name; each is a side.
        weights: by `Form.qat`.
        images, count: see `DeployTask`.

    Returns:
        What was measured at each batch size, and the logits of all images by each form that gave any.
    """

    def task(batch_size: int) -> DeployTask:
        checked = count if batch_size == max(BATCHES) else min(count, _CHECKED_ONE_BY_ONE)
        return DeployTask(forms=dict(forms), images=str(images), checked=checked, batch_size=batch_size)

    say(f"classifying {count} images with the weights in float32")
    expected = {qat: _logits(these, task(max(BATCHES))) for qat, these in weights.items()}
    measured = [Measured(batch_size, {name: Times() for name in forms}) for batch_size in BATCHES]
    for at in reversed(measured):  # the larger batch first: there all images are classified
        say(f"batch {at.batch_size}: each form classifies {task(at.batch_size).checked} images before it is timed")
        take_turns(
            task(at.batch_size),
            at.sides,
            compare=functools.partial(_compare, at, forms, expected),
            rounds=rounds,
            environment={"JAX_PLATFORMS": "cpu"},
        )
    ready = {name: times.ready for name, times in measured[-1].sides.items() if times.ready is not None}
    return measured, {name: known.check for name, known in ready.items()}


def _compare(measured: Measured, forms: Mapping[str, Form], expected: Mapping[bool, Logits]) -> None:
    """Fills in the distances, and failures where they are too large."""
    for name, times in not_failed(measured.sides).items():
        got = times.ready.check
        distance = compare(got, expected[forms[name].qat][: len(got)], forms[name].dtype)
        measured.distances[name], times.difference = distance, distance.value
        if not distance.passed:
            off = f"{distance.value:.1e} of the {distance.kind}"
            times.failure = f"its logits are off by {off}, the bound is {distance.bound:g}: not timed"


def _logits(weights: Weights, task: DeployTask) -> Logits:
    run = run_torch(weights)
    return np.concatenate([run(batch) for batch in task.batches()])[: task.checked]
