"""What the programs of a run are compiled with."""

import dataclasses
from contextlib import closing

import pytest

from train.devices.mesh import make_mesh
from train.optim import programs
from train.optim.programs import Plan, Programs, compiler_options
from train.recipes import RECIPES
from train.tasks.classification import Classification


@pytest.mark.parametrize(
    ("platform", "deterministic", "told"),
    [("gpu", True, True), ("gpu", False, False), ("cpu", True, False), ("tpu", True, False)],
)
def test_on_gpus_alone_xla_is_told_that_the_same_steps_have_to_give_the_same_bits(platform, deterministic, told):
    options = compiler_options(dataclasses.replace(RECIPES["digits"], deterministic=deterministic), platform)
    assert (options is not None) == told
    if told:
        assert options["xla_gpu_exclude_nondeterministic_ops"] is True
        assert options["xla_gpu_autotune_level"] == 0  # else the next start may choose other kernels


def test_training_and_evaluation_are_compiled_with_these_options(small_variant, monkeypatch):
    monkeypatch.setattr(programs, "compiler_options", lambda config, platform: {"xla_no_such_option": True})
    config = dataclasses.replace(RECIPES["digits"], batch_size=8, precision="float32", augment_on="host")
    task = Classification(config, config.model_config(3), ("a", "b", "c"))
    with closing(Programs(Plan(task, config, make_mesh(), 10, eval_batch_size=8))) as compiled:
        for name in ("train_step", "eval_step"):
            with pytest.raises(RuntimeError, match="xla_no_such_option"):
                getattr(compiled, name)
