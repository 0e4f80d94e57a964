"""Whole runs of pre-training by self-distillation, and what can be made of their weights."""

import dataclasses
import math
import shutil
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from convert import digits, load_weights
from convert.formats.run_folder import read_state
from convert.tree import flatten
from crossvit_jax.pretraining.dino import DinoHead
from tests.command_line import printed_by, refusal
from tests.small_model import shrink, small_config
from train.main import main
from train.optim.state import abstract_model
from train.recipes import RECIPES
from train.run.metrics_log import read_metrics
from train.tasks.begin import starting_model
from train.tasks.pretraining.dino import Dino
from train.tasks.pretraining.weights import HEAD
from train.tasks.task import choosing_metric

Run = namedtuple("Run", "folder flags out")
_FLAGS = ["--task=pretraining", "--method=dino", "--image-size=48", "--prototypes=12", "--epochs=3"]
_FLAGS += ["--warmup-epochs=0", "--batch-size=24", "--workers=0", "--log-every=1", "--seed=3", "--weight-decay-end=0.4"]
_CONFIG = dataclasses.replace(RECIPES["dino-digits"], prototypes=12, batch_size=4)


@pytest.fixture(scope="module", autouse=True)
def small():
    """A small variant with a small head, few digits, and no curves."""
    rows = digits._stored()[:100]
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch.setitem)
        patch.setitem(HEAD, "hidden", 16)
        patch.setitem(HEAD, "bottleneck", 8)
        patch.setattr(digits, "_stored", lambda: rows)
        patch.setattr("train.loop.draw_curves", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three epochs of three steps on digits of 48 pixels."""
    folder = tmp_path_factory.mktemp("dino") / "run"
    flags = [*_FLAGS, f"--output={folder}"]
    return Run(folder, flags, printed_by(main, *flags))


def test_a_run_leaves_metrics_pictures_and_the_teacher(run):
    assert "recipe dino-digits" in run.out and "(dino, 2 large crops and 2 small ones)" in run.out
    evaluations = [line for line in read_metrics(run.folder) if "eval/loss" in line]
    assert [line["epoch"] for line in evaluations] == [1, 2, 3]
    assert all(0 <= line["eval/knn"] <= 100 and line["eval/loss"] > 0 for line in evaluations)
    assert all((run.folder / name).is_file() for name in ("train_batch.png", "predictions.png"))
    teacher = read_state(run.folder / "checkpoints" / "9", ["extra"])["extra"]["teacher"]
    for source in (f"{run.folder}:last", run.folder / "weights.safetensors"):
        weights = load_weights(source)
        assert weights.config.num_classes == 0 and "left out of it: head" in f"{weights.notes} {weights.origin}"
        for name, array in flatten(teacher["body"]).items():
            np.testing.assert_array_equal(weights.tensors[name], array)


def test_a_run_that_has_not_come_to_its_end_is_a_source_by_its_teacher(run, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(run.folder, again)
    for file in again.glob("weights*"):
        file.unlink()
    weights, last = load_weights(again), load_weights(f"{run.folder}:last")
    assert weights.notes[-2:] == ("of student and teacher, the latter was taken", "left out of it: head")
    assert all(np.array_equal(weights.tensors[name], array) for name, array in last.tensors.items())


def test_teacher_centre_and_step_are_state_of_the_run(run):
    state = read_state(run.folder / "checkpoints" / "9")
    assert state["extra"]["step"] == state["step"] == 9 and state["extra"]["centre"].any()
    student, teacher = flatten(state["params"]["head"]), flatten(state["extra"]["teacher"]["head"])
    assert all(0 < np.abs(student[name] - array).max() < 0.1 for name, array in teacher.items())


class _Colours(nnx.Module):
    """DINO's head on the mean colours of an image."""

    def __init__(self, rngs):
        self.head = DinoHead(3, 12, **HEAD, rngs=rngs)

    def __call__(self, images, rngs=None):
        return self.head(images.mean((1, 2)))


def test_the_last_layer_begins_to_learn_in_the_second_epoch_and_the_centre_is_that_of_the_whole_batch():
    task = Dino(_CONFIG, small_config(0), tuple("0123456789"), steps_per_epoch=2)
    rng, shapes = np.random.default_rng(0), task.batch_shapes(4, training=True)
    batch = {name: jnp.asarray(rng.normal(size=shape.shape), shape.dtype) for name, shape in shapes.items()}
    graphdef, params = nnx.split(_Colours(nnx.Rngs(0)))
    params = nnx.to_pure_dict(params)

    @jax.jit
    def run(params, batch, extra):
        def loss(params):
            return task.loss(nnx.merge(graphdef, params), batch, extra, rngs=nnx.Rngs(0))

        grads, aux = jax.grad(loss, has_aux=True)(params)
        return grads["head"], aux, task.update(extra, aux, params, extra["step"] + 1)

    extra = task.extra(params)
    for step in (1, 2):
        grads, aux, new = run(params, batch, extra | {"step": jnp.int32(step)})
        assert np.asarray(grads["last_layer"]["kernel"]).any() == (step == 2)
        assert np.asarray(grads["mlp"][0]["kernel"]).any() and new["step"] == step + 1
        np.testing.assert_allclose(new["centre"], 0.1 * aux["said"], rtol=1e-5)
    # with gradient accumulation, `update` gets the mean over the parts
    parts = [run(params, {name: x[i::2] for name, x in batch.items()}, extra)[1]["said"] for i in range(2)]
    np.testing.assert_allclose((parts[0] + parts[1]) / 2, aux["said"], rtol=1e-4, atol=1e-7)


def test_the_teachers_momentum_goes_from_its_setting_to_one_along_a_cosine():
    """As DINO's code has it with `--momentum_teacher`: `cosine_scheduler(momentum, 1, epochs, steps)`."""
    config = dataclasses.replace(_CONFIG, teacher_momentum=0.9, epochs=2, warmup_epochs=0)
    task = Dino(config, small_config(0), (), steps_per_epoch=50)
    teacher, student, aux = {"x": jnp.zeros(3)}, {"x": jnp.ones(3)}, {"said": jnp.zeros(config.prototypes)}
    kept = [
        1 - task.update(task.extra(teacher) | {"step": jnp.int32(step)}, aux, student, step)["teacher"]["x"][0]
        for step in (0, 25, 50, 75, 99)
    ]
    expected = [1 - 0.1 * 0.5 * (1 + math.cos(math.pi * step / 100)) for step in (0, 25, 50, 75, 99)]
    np.testing.assert_allclose(kept, expected, rtol=1e-6)


def test_a_run_that_goes_on_ends_with_the_same_bits(run, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(run.folder, again)
    shutil.rmtree(again / "checkpoints" / "9")
    for file in again.glob("weights*"):
        file.unlink()
    assert "continued after step 6 of 9" in printed_by(main, *run.flags, f"--output={again}")
    assert read_metrics(again) == read_metrics(run.folder)
    one, other = (load_file(folder / "weights.safetensors") for folder in (run.folder, again))
    assert one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


def test_of_pictures_that_nobody_labelled_the_loss_alone_is_told():
    """Their features come along: neighbours are drawn by them."""
    outputs = {"mask": np.ones(3), "label": np.zeros(3, np.int32), "features": np.eye(3), "sums": {"loss": np.ones(())}}
    for names, told in (((), {"images", "loss"}), (("a", "b"), {"images", "loss", "knn"})):
        scores = Dino(_CONFIG, small_config(0), names, steps_per_epoch=2).scores(None)
        scores.add(outputs)
        assert scores.values().keys() == told


def test_without_labels_the_loss_chooses_and_without_small_crops_there_are_none():
    task = Dino(dataclasses.replace(_CONFIG, local_crops=0), small_config(0), (), steps_per_epoch=2)
    assert task.metrics == () and choosing_metric(task.metrics).name == "loss"
    assert task.batch_shapes(3, training=True).keys() == {"image"}
    shapes = task.batch_shapes(3, training=False) | {"image": jax.ShapeDtypeStruct((3, 48, 48, 3), np.float32)}
    outputs = nnx.eval_shape(task.evaluate, abstract_model(task, task.config), shapes)
    assert outputs["features"].shape == (3, 36)


def test_a_run_starts_from_any_weights_with_a_new_head(run):
    config = dataclasses.replace(_CONFIG, init=str(run.folder), image_size=48)
    _, weights = starting_model(config, (), None, starts_anew=True)
    assert any("new for pre-training: head" in note for note in weights.notes)
    assert weights.tensors["head.last_layer.weight"].shape == (12, 8) and "body.cls_token_0" in weights.tensors


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--mask-cell=12"], "mask_cell is no setting of dino; got 12"),
        (["--ema-decay=0.9"], "ema_decay is no setting of dino: its teacher is an average"),
        (["--augment-on=device"], "augment_on device is no setting of dino"),
        (["--prototypes=1"], "prototypes must be at least 2; got 1"),
        (["--teacher-momentum=1"], "teacher_momentum must be at least 0 and below 1; got 1.0"),
        (["--local-scale=0.5,0.2"], "local_scale must be rising numbers"),
        (["--image-size=72"], "method dino sees images at half their side: image height 36 does not divide"),
        (["--batch-size=200"], "batch_size 200 is more than the 80 training images"),
        (["--method=simmim", "--local-crops=2"], "local_crops is no setting of simmim; got 2"),
    ],
)
def test_settings_that_make_no_run_are_refused_in_a_line(flags, message, tmp_path, capsys):
    folder = tmp_path / "run"
    base = ["--task=pretraining", "--method=dino", "--image-size=48"]
    assert message in refusal(capsys, "python -m train.main", main, *base, *flags, f"--output={folder}")
    assert not folder.exists()
