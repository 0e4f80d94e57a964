"""A classifier that follows another: timm's loss, the teacher as its file has it, runs that go on, refusals."""

import dataclasses
import shutil
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import timm.task
import torch
from flax import nnx
from timm.loss import SoftTargetCrossEntropy

import convert
import train.main
from convert.errors import SettingsError
from convert.formats.run_folder import read_state
from convert.tree import flatten, nest
from crossvit_torch import CrossViT, CrossViTSegmenter
from tests.small_model import small_config, small_segmenter
from tests.train.optim.test_step import Linear
from tests.train.small_weights import save_small, small_timm_model
from train.config import TrainConfig
from train.optim.optimizer import make_optimizer
from train.optim.state import make_state
from train.optim.step import make_train_step
from train.run.folder import check_same_run
from train.tasks.classification import Classification
from train.tasks.distillation import Teacher, distillation_loss

_DIGITS, _CLASSES = "0123456789", 7


# --- the loss ---


class _Says(torch.nn.Module):
    """A model of timm's kind that says the same whatever it sees."""

    pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}  # noqa: RUF012

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(logits))

    def forward(self, images):
        return self.logits


@dataclass(frozen=True)
class _Linear(Teacher):
    """Says the means of the channels, weighted by its parameters."""

    def logits(self, params, images, *, dtype):
        return jax.lax.stop_gradient(images.mean((1, 2)).astype(jnp.float32) @ params)


@dataclass(frozen=True)
class _SaysToo(Teacher):
    """Says its parameters."""

    def logits(self, params, images, *, dtype):
        return params


class _Student:
    dtype = None

    def __init__(self, logits):
        self.logits = logits

    def __call__(self, images, *, rngs):
        return self.logits


@pytest.mark.parametrize(
    ("settings", "timms"),
    [
        ({}, {}),
        ({"distill_alpha": 0.7, "distill_temperature": 3.0}, {"task_loss_weight": 1 - 0.7, "temperature": 3.0}),
        ({"distill_alpha": 1.0, "distill_temperature": 0.5}, {"task_loss_weight": 0.0, "temperature": 0.5}),
    ],
)
def test_loss_and_gradient_are_those_of_timms_task(settings, timms):
    rng = np.random.default_rng(0)
    student, taught = 4 * rng.standard_normal((2, 5, _CLASSES))
    targets = rng.dirichlet(np.ones(_CLASSES), 5)
    model = _Says(student)
    about = {"criterion": SoftTargetCrossEntropy(), "verbose": False, "dtype": torch.float64}
    task = timm.task.LogitDistillationTask(model, timm.task.DistillationTeacher(_Says(taught)), **about, **timms)
    expected = task(torch.zeros(5, 3, 4, 4, dtype=torch.float64), torch.tensor(targets))["loss"]
    expected.backward()

    config = TrainConfig(distill="x", **settings)
    ours = Classification(config, small_config(_CLASSES), (), teacher=_SaysToo(small_config(_CLASSES), ()))
    with jax.enable_x64():
        batch = {"image": jnp.zeros((5, 4, 4, 3)), "targets": jnp.asarray(targets)}

        def loss(logits):
            return ours.loss(_Student(logits), batch, jnp.asarray(taught), rngs=None)[0]

        value, gradient = jax.value_and_grad(loss)(jnp.asarray(student))
    assert float(value) == pytest.approx(expected.item(), rel=1e-12)
    np.testing.assert_allclose(gradient, model.logits.grad, rtol=0, atol=1e-12)


def test_half_precision_logits_are_compared_in_float32():
    logits, taught = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, _CLASSES)), jnp.bfloat16)
    loss = distillation_loss(logits, taught, 2.0)
    assert loss.dtype == jnp.float32
    wide = distillation_loss(logits.astype(jnp.float32), taught.astype(jnp.float32), 2.0)
    assert float(loss) == float(wide) > 0


def _steps(**changes):
    """Losses of three steps of a small model that follows a smaller one, and the weights afterwards."""
    settings = {"epochs": 2, "warmup_epochs": 0, "lr": 1e-2, "lr_batch_size": 8, "batch_size": 8, "distill": "x"}
    config, model = TrainConfig(**settings | {"mixup": 0, "cutmix": 0} | changes), Linear()
    teacher = _Linear(small_config(_CLASSES), (), params=5 * np.eye(3, _CLASSES, dtype=np.float32))
    task = Classification(config, small_config(_CLASSES), (), teacher=teacher)
    optimizer = make_optimizer(config, steps_per_epoch=3)
    step = jax.jit(make_train_step(model, task, optimizer, config))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    state = make_state(params, optimizer, config) | {"extra": task.extra(params)}
    rng, losses = np.random.default_rng(0), []
    batch = {"image": rng.normal(size=(8, 2, 2, 3)).astype(np.float32), "label": np.arange(8) % _CLASSES}
    for _ in range(3):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    np.testing.assert_array_equal(state["extra"], teacher.params)
    targets = task.prepare(batch, jax.random.key(0))["targets"]
    logits = Linear()(batch["image"])
    taught = teacher.logits(teacher.params, jnp.asarray(batch["image"]), dtype=None)
    first = jnp.mean(optax.softmax_cross_entropy(logits, targets)) + distillation_loss(logits, taught, 1.0)
    assert losses[0] == pytest.approx(float(first), rel=1e-6)
    return losses, state["params"]["kernel"]


def test_accumulated_gradients_and_scaled_losses_give_the_step_of_the_whole_batch(monkeypatch):
    monkeypatch.setattr(Linear, "__call__", lambda self, x, *, rngs=None: x.reshape(len(x), -1) @ self.kernel[...])
    monkeypatch.setattr(Linear, "dtype", jnp.float32, raising=False)
    losses, kernel = _steps()
    others, other = _steps(grad_accum=4, precision="float16", ema_decay=0.5)
    np.testing.assert_allclose(others, losses, rtol=1e-6)
    np.testing.assert_allclose(other, kernel, rtol=0, atol=1e-6)


# --- the teacher ---


def test_it_says_of_images_of_any_size_what_timms_model_says():
    timms = small_timm_model(10)
    order = (3, 1, 4, 0, 5, 9, 2, 6, 8, 7)
    config = dataclasses.replace(small_config(10), drop_rate=0.5, drop_path_rate=0.5)  # of its own training
    params = nest({name: tensor.numpy() for name, tensor in timms.state_dict().items()})
    teacher = Teacher(config, order, params=params)
    images = np.random.default_rng(0).standard_normal((2, 60, 60, 3), np.float32)
    with torch.no_grad():
        expected = timms(torch.tensor(images).permute(0, 3, 1, 2)).numpy()[:, list(order)]

    def said(params, images):
        logits = teacher.logits(params, images, dtype=jnp.float32)
        return jnp.sum(logits), logits

    (of_params, of_images), logits = jax.jit(jax.grad(said, (0, 1), has_aux=True))(params, images)
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()
    assert not any(np.any(leaf) for leaf in jax.tree.leaves((of_params, of_images)))


# --- runs ---


def _flags(data, *more):
    usual = ["--recipe=digits", f"--data-dir={data}", "--batch-size=16", "--epochs=1", "--workers=0"]
    usual += ["--checkpoint-every=7"]
    return [*usual, *map(str, more)]


@pytest.mark.slow
def test_a_run_with_fewer_tokens_goes_on_bit_for_bit_when_the_teacher_is_gone(
    few_digits_dir, no_curves, tmp_path, capsys
):
    student = save_small(tmp_path / "student.safetensors", _DIGITS)
    source = save_small(tmp_path / "teacher.safetensors", _DIGITS, order=_DIGITS[::-1])
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    flags = _flags(few_digits_dir, f"--init={student}", "--reduce-tokens=merge:4,1", f"--distill={source}")
    assert train.main.main([*flags, f"--output={whole}"]) == 0
    out = capsys.readouterr().out
    assert "at 48 pixels, merge:4,1, 10 classes" in out
    assert "the teacher, custom: the data set has the weights' classes in another order" in out
    assert convert.load_weights(whole).config.reduce_tokens == "merge:4,1"
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "14")
    taught = convert.load_weights(source).tensors
    source.unlink()
    assert train.main.main([f"--resume={resumed}", f"--data-dir={few_digits_dir}"]) == 0
    assert "continued after step 7 of 14" in capsys.readouterr().out
    assert (resumed / "weights.safetensors").read_bytes() == (whole / "weights.safetensors").read_bytes()

    checkpoint = resumed / "checkpoints" / "14"
    left = flatten(read_state(checkpoint, ["extra"])["extra"])
    assert left.keys() == taught.keys()
    for name, tensor in taught.items():
        np.testing.assert_array_equal(left[name], tensor)
    trained = convert.load_weights(checkpoint).tensors  # not the teacher that lies beside it
    of_file = convert.load_weights(whole / "weights.safetensors").tensors
    np.testing.assert_array_equal(trained["norm.0.weight"], of_file["norm.0.weight"])
    assert not np.array_equal(trained["norm.0.weight"], taught["norm.0.weight"])
    assert train.main.main([*(flag for flag in flags if "reduce" not in flag), f"--output={whole}"]) == 2
    assert "reduce_tokens was 'merge:4,1' and is None" in capsys.readouterr().err


def _other(tmp_path, kind):
    """A file with a model that cannot teach one for digits of 48 pixels."""
    path = tmp_path / f"{kind}.safetensors"
    if kind == "classes":
        return save_small(path, "abcdefghij")
    if kind == "count":
        return save_small(path, _DIGITS[:9])
    if kind == "segmenter":
        config = small_segmenter()
        return convert.save(CrossViTSegmenter(config).state_dict(), config, path)
    changes = {"shape": {"image_size": (48, 96)}, "grey": {"in_chans": 1}, "nan": {}}[kind]
    config = small_config(10).replace(**changes)
    state = CrossViT(config).state_dict()
    if kind == "nan":
        state["norm.0.bias"][0] = np.nan
    return convert.save(state, config, path, class_names=_DIGITS)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("classes", "the data set has 10 classes, the weights have 10; only in the data set: 0, 1, 2 and 7 more; only"),
        ("count", "the data set has 10 classes, the weights have 9"),
        ("segmenter", "is a model for segmentation: only a classifier can teach one"),
        ("shape", "sees images of 48 x 96 pixels, and this model 48 x 48: they would be distorted"),
        ("grey", "takes images of 1 channels, and runs read colour images"),
        ("nan", "weights are NaN or infinite: norm.0.bias (1)"),
    ],
)
def test_a_source_that_cannot_teach_is_refused_before_anything_is_written(
    few_digits_dir, tmp_path, capsys, kind, message
):
    source, output = _other(tmp_path, kind), tmp_path / "run"
    capsys.readouterr()
    assert train.main.main(_flags(few_digits_dir, f"--distill={source}", f"--output={output}")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"--distill {source}" in error and message in error
    assert not output.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--distill=none.pth"], "none.pth"),
        (["--distill=x", "--task=detection"], "distill is no setting of detection; got"),
        (["--distill-alpha=0.5"], "distill_alpha is a setting of --distill: name the classifier to follow"),
        (["--distill-temperature=2"], "distill_temperature is a setting of --distill"),
        (["--distill=x", "--distill-alpha=1.5"], "distill_alpha must be between 0 and 1; got 1.5"),
        (["--distill=x", "--distill-temperature=0"], "distill_temperature must be above 0; got 0"),
        (["--kd-model-name=x"], "--distill SOURCE"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(few_digits_dir, tmp_path, capsys, flags, message):
    try:
        status = train.main.main([f"--data-dir={few_digits_dir}", f"--output={tmp_path / 'run'}", *flags])
    except SystemExit as exit:
        status = exit.code
    error = capsys.readouterr().err
    assert (status, error.count("\n")) == (2, 1)
    assert message in error
    assert not (tmp_path / "run").exists()


def test_a_run_with_another_teacher_is_another_run():
    """Older runs, which know no teacher, go on: see tests/train/test_compatibility.py."""
    saved = {"train": dataclasses.asdict(TrainConfig(distill="a")), "model": {}, "data": {}}
    described = {**saved, "train": dataclasses.asdict(TrainConfig(distill="b"))}
    with pytest.raises(SettingsError, match="distill was 'a' and is 'b'"):
        check_same_run(saved, described, "run")
