"""What training steps of detection and segmentation have in common."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

from tests.compilation import xla_flags
from tests.train.tasks.dense_models import SIDE, make_batch, make_task
from train.optim.optimizer import layer_scales, make_optimizer
from train.optim.state import abstract_model, make_state, trained_and_frozen
from train.optim.step import make_train_step

_KINDS = ("detection", "segmentation")
_LAST = "backbone.body.blocks.0"  # the only stage


@pytest.fixture(scope="module")
def differences():
    """Of losses and weights from those of plain steps on one device, in float64; relative."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(devices=2), "JAX_ENABLE_X64": "1"}
    command = [sys.executable, "-m", "tests.train.tasks.dense_models"]
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize("kind", _KINDS)
def test_parts_of_a_batch_and_two_devices_give_the_step_of_the_whole_batch(differences, kind):
    found = {name: values for name, values in differences.items() if name.startswith(kind)}
    assert len(found) == 2
    assert max(map(max, found.values())) < 1e-11, found


def _names(tree):
    return {".".join(map(str, path)): leaf for path, leaf in flatten_dict(tree).items()}


def _is_body(name):
    return name.startswith("backbone.body.")


def test_parameters_that_take_no_part_stay_as_they_are_and_all_others_are_trained():
    kind = "detection"
    task = make_task(kind, weight_decay=0.5, ema_decay=0.9, lr=1e-2, layer_decay=0.9)
    config = task.config
    model = task.model(dtype=None, rngs=nnx.Rngs(0))
    optimizer = make_optimizer(
        config, steps_per_epoch=10, no_weight_decay=model.no_weight_decay(), layer_of=model.layer_of
    )
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    first = jax.device_get(_names(params))
    state = make_state(params, optimizer, config, model)
    step = jax.jit(make_train_step(model, task, optimizer, config))
    for _ in range(20):
        state, metrics = step(state, make_batch(kind))
    assert np.isfinite(metrics["loss"])
    unused = {name for name in first if model.unused(name)}
    assert unused
    for which in ("params", "ema"):
        now = _names(state[which])
        same = {name for name, array in first.items() if np.array_equal(array, now[name])}
        assert same == unused
        assert all(np.isfinite(array).all() for array in now.values())
    moments = sum(leaf.size for leaf in jax.tree.leaves(state["opt"]) if leaf.ndim)
    assert moments == 2 * sum(array.size for name, array in first.items() if name not in unused)


@pytest.mark.parametrize("kind", _KINDS)
def test_parameters_that_take_no_part_are_those_of_the_last_fusion(kind):
    task = make_task(kind)
    model = abstract_model(task, task.config)
    trained, frozen = map(_names, trained_and_frozen(nnx.to_pure_dict(nnx.state(model)), task.config, model))
    parts = ("projs", "fusion", "revert_projs")
    fusion = {name for name in {**trained, **frozen} if name.startswith(tuple(f"{_LAST}.{part}." for part in parts))}
    assert frozen.keys() == fusion and len(fusion) > 30


@pytest.mark.parametrize("kind", _KINDS)
def test_a_frozen_backbone_is_the_body_alone(kind):
    task = make_task(kind, freeze_backbone=True)
    model = abstract_model(task, task.config)
    trained, frozen = map(_names, trained_and_frozen(nnx.to_pure_dict(nnx.state(model)), task.config, model))
    assert all(map(_is_body, frozen)) and not any(map(_is_body, trained))
    parts = {name.split(".")[0] if not name.startswith("backbone.") else "backbone.pyramid" for name in trained}
    assert parts == {"backbone.pyramid", "head" if kind == "detection" else "decoder"}


@pytest.mark.parametrize("kind", _KINDS)
def test_what_stands_on_the_body_has_the_top_learning_rate(kind):
    task = make_task(kind)
    model = abstract_model(task, task.config)
    scales = _names(layer_scales(nnx.to_pure_dict(nnx.state(model)), 0.5, model.layer_of))
    assert {scale for name, scale in scales.items() if not _is_body(name)} == {1.0}
    assert min(scales.values()) == scales["backbone.body.pos_embed_0"] == 0.125  # below the only block and its fusion
    assert {f"backbone.body.{name}" for name in ("cls_token_0", "pos_embed_1")} <= model.no_weight_decay()


@pytest.mark.parametrize("kind", _KINDS)
def test_images_that_count_nowhere_change_no_score(kind):
    """Also where they are not blank, as those are that stand in for unreadable ones."""
    task = make_task(kind)
    model = task.model(dtype=None, rngs=nnx.Rngs(0))
    model.eval()
    batch = make_batch(kind)
    evaluate = jax.jit(lambda batch: task.evaluate(model, batch))
    counted = jnp.arange(8) < 7
    nothing = {name: batch[name][7] for name in batch}
    nothing |= {"segments": jnp.full((SIDE, SIDE), 255, jnp.uint8)} if kind == "segmentation" else {}
    outputs = []
    for image in (batch["image"][7], jnp.zeros((SIDE, SIDE, 3))):
        changed = {name: batch[name].at[7].set(value) for name, value in (nothing | {"image": image}).items()}
        outputs.append(jax.device_get(evaluate(changed | {"mask": counted.astype(jnp.float32)})))
    for name, value in outputs[0]["sums"].items():
        assert np.isfinite(value) and value > 0
        assert value == pytest.approx(outputs[1]["sums"][name], rel=1e-6)
    if kind == "detection":
        assert not outputs[0]["valid"][7].any() and outputs[0]["valid"][:7].any()
