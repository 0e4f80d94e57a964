"""Tasks are data: the sides that they name, and the modules that these are loaded from."""

import pkgutil

import pytest

from benchmarks.task import DataTask, DeployTask, DetectionTask, EndToEndTask, ModelTask

_MODEL = {"variant": "ti", "batch_size": 4, "weights": "none"}


@pytest.mark.parametrize(
    ("task", "sides"),
    [
        (ModelTask(benchmark="training", **_MODEL), ModelTask.SIDES),
        (DetectionTask(benchmark="training", **_MODEL), DetectionTask.SIDES),
        (EndToEndTask(folder="none", files=1, workers=1, **_MODEL), EndToEndTask.SIDES),
        (DataTask(batch_size=1), DataTask.SIDES),
        (DeployTask(about={}, forms={}, images="none", checked=1, batch_size=1), ("any form",)),
    ],
)
def test_every_side_is_loaded_by_a_function_that_a_task_names(task, sides):
    assert all(callable(pkgutil.resolve_name(task.loader(side))) for side in sides)
