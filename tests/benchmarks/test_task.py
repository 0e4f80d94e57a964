"""Tasks are data: the sides that they name, and the modules that these are loaded from."""

import multiprocessing
import pkgutil
import time

import psutil
import pytest

from benchmarks.task import DataTask, DeployTask, DetectionTask, EndToEndTask, ModelTask, cpu_seconds

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


def test_what_children_work_and_have_worked_counts():
    before = cpu_seconds(psutil.Process())
    child = multiprocessing.get_context("spawn").Process(target=_work)
    child.start()
    try:
        _wait_until(lambda: cpu_seconds(psutil.Process(child.pid)) >= 0.1)
        assert cpu_seconds(psutil.Process()) >= before + 0.1
    finally:
        child.kill()
        child.join()
    assert cpu_seconds(psutil.Process()) >= before + 0.1


def _wait_until(condition):
    end = time.monotonic() + 60
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    assert condition()


def _work():
    while True:
        pass
