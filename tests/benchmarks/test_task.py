"""Tasks are data: the sides that they name, and the modules that these are loaded from."""

import pkgutil

import pytest

from benchmarks.task import (
    DATA_SIDES,
    FLAX_FED,
    SIDES,
    TIMM_FED,
    DataTask,
    DeployTask,
    EndToEndTask,
    Task,
    default_sides,
)

_STEP = Task(benchmark="training", variant="ti", batch_size=4, dtype="float32", device="cpu", weights="none")
_FED = EndToEndTask(step=_STEP, folder="none", workers=1)


@pytest.mark.parametrize(
    ("device", "dtype", "sides"),
    [
        ("cpu", "bfloat16", ["flax", "timm", "timm-compile"]),
        ("gpu", "bfloat16", list(SIDES)),
        ("gpu", "float32", ["flax", "timm", "timm-compile", "timm-channels-last"]),
    ],
)
def test_the_sides_that_suit_the_device(device, dtype, sides):
    assert default_sides(device, dtype) == sides


@pytest.mark.parametrize(
    ("task", "sides"),
    [
        (_STEP, SIDES),
        (_FED, ("flax", *FLAX_FED, "timm", TIMM_FED)),
        (DataTask(), DATA_SIDES),
        (DeployTask(forms={}, images="none", checked=1, batch_size=1), ("any form",)),
    ],
)
def test_every_side_is_loaded_by_a_function_that_a_task_names(task, sides):
    assert all(callable(pkgutil.resolve_name(task.loader(side))) for side in sides)


def test_the_steps_alone_and_the_pipelines_are_loaded_from_modules_of_their_own():
    modules = {side: _FED.loader(side).removeprefix("benchmarks.sides.") for side in ("flax", "flax-host", TIMM_FED)}
    assert modules == {"flax": "fed:load_step_alone", "flax-host": "fed_flax:load", TIMM_FED: "fed_timm:load"}
