"""The train and evaluation steps: the loss, what is random in them, and what counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from sklearn.utils.class_weight import compute_class_weight
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3

from convert.errors import SettingsError
from tests.train.steps import classification, init_state, make_eval_step, make_train_step
from train.config import TrainConfig
from train.data.folders.classes import FolderSource
from train.data.sources import Matched
from train.devices.mesh import make_mesh, state_shardings
from train.optim.optimizer import make_optimizer
from train.optim.state import abstract_model, abstract_state, lower_init, make_state
from train.optim.step import jit_train_step
from train.recipes import RECIPES
from train.tasks.classification import (
    Classification,
    balanced_weights,
    binary_cross_entropy,
    soft_target_cross_entropy,
    within_top,
)

_CLASSES = 7


class Linear(nnx.Module):
    """A model in CrossViT's manner, small enough to compile at once: drops whole images while it trains."""

    def __init__(self, classes=_CLASSES):
        self.num_classes = classes
        self.kernel = nnx.Param(jax.random.normal(jax.random.key(0), (12, classes)))
        self.deterministic = False

    def __call__(self, images, *, rngs=None):
        logits = images.reshape(len(images), -1) @ self.kernel[...]
        if self.deterministic:
            return logits
        return logits * jax.random.bernoulli(rngs.dropout(), 0.5, (len(images), 1))


def _config(**changes) -> TrainConfig:
    settings = {"epochs": 2, "warmup_epochs": 0, "lr": 1e-2, "lr_batch_size": 8, "batch_size": 8}
    return TrainConfig(**settings | changes)


def _batch(size=8):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(size, 2, 2, 3)).astype(np.float32)
    return {"image": jnp.asarray(images), "label": jnp.asarray(rng.integers(0, _CLASSES, size).astype(np.int32))}


def _run(config, steps=4):
    model = Linear()
    optimizer = make_optimizer(config, steps_per_epoch=3)
    step = jax.jit(make_train_step(model, optimizer, config))
    state = make_state(nnx.to_pure_dict(nnx.state(model, nnx.Param)), optimizer, config)
    losses = []
    for _ in range(steps):
        state, metrics = step(state, _batch())
        losses.append(float(metrics["loss"]))
    return losses, state


@pytest.mark.parametrize(
    ("loss", "reference"),
    [(soft_target_cross_entropy, SoftTargetCrossEntropy()), (binary_cross_entropy, BinaryCrossEntropy())],
)
def test_the_losses_are_timms(loss, reference):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5, 9)).astype(np.float32)
    targets = rng.dirichlet(np.ones(9), size=5).astype(np.float32)
    expected = reference(torch.tensor(logits), torch.tensor(targets))
    losses = loss(jnp.asarray(logits), jnp.asarray(targets))
    assert float(losses.mean()) == pytest.approx(float(expected), rel=1e-6)


def test_the_loss_that_is_asked_for_is_trained():
    softmax, binary = (_run(_config(loss=loss), steps=1)[0][0] for loss in ("softmax", "bce"))
    assert binary != pytest.approx(softmax, rel=0.05)


def test_balanced_classes_weigh_in_the_loss_as_in_torch_and_scikit_learn():
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat([0, 1, 2], [20, 5, 2]))
    source = FolderSource("", ("",) * len(labels), labels)
    weights = balanced_weights(Matched(source, (2, 0, 1)), "abc")
    expected = compute_class_weight("balanced", classes=np.arange(3), y=(labels - 1) % 3)
    np.testing.assert_allclose(weights, expected)
    with pytest.raises(SettingsError, match="no training image has the class d"):
        balanced_weights(source, "abcd")

    logits, targets = (rng.normal(size=(8, 3)).astype(np.float32) for _ in range(2))
    targets = np.exp(targets) / np.exp(targets).sum(1, keepdims=True)
    config = dataclasses.replace(RECIPES["digits"], class_weights="balanced")
    task = Classification(config, config.model_config(3), ("a", "b", "c"), weights)
    loss, aux = task.loss(lambda images, rngs: images, {"image": logits, "targets": targets}, None, rngs=None)
    reference = torch.nn.functional.cross_entropy(*map(torch.tensor, (logits, targets)), weight=torch.tensor(weights))
    assert float(loss) == pytest.approx(float(reference), rel=1e-6)
    assert float(aux["top1"]) == np.mean(logits.argmax(1) == targets.argmax(1))
    with pytest.raises(SettingsError, match="class_weights balanced is for loss softmax"):
        dataclasses.replace(config, loss="bce")


def test_half_precision_logits_lose_nothing_more():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(5, 9)), jnp.bfloat16)
    targets = jax.nn.one_hot(jnp.arange(5), 9)
    losses = soft_target_cross_entropy(logits, targets)
    assert losses.dtype == jnp.float32
    np.testing.assert_array_equal(losses, soft_target_cross_entropy(logits.astype(jnp.float32), targets))


def test_the_same_seed_gives_the_same_losses_bit_for_bit_and_another_others():
    losses, state = _run(_config())
    assert losses == _run(_config())[0]
    assert losses != _run(_config(seed=1))[0]
    assert state["step"] == 4


def test_every_step_mixes_and_drops_anew():
    config = _config(lr=1e-30, min_lr=0.0, weight_decay=0.0)  # nothing is learned, so only chance moves the loss
    for chance in (config, dataclasses.replace(config, mixup=0.0, cutmix=0.0)):
        assert len(set(_run(chance)[0])) == 4


def test_the_top1_of_training_is_that_of_the_larger_target():
    config = _config(mixup=0.0, cutmix=0.0, smoothing=0.1)
    model = Linear()
    model.kernel[...] = jnp.zeros((12, _CLASSES)).at[0, 3].set(1.0)
    optimizer = make_optimizer(config, steps_per_epoch=1)
    state = make_state(nnx.to_pure_dict(nnx.state(model, nnx.Param)), optimizer, config)
    batch = {"image": jnp.ones((8, 2, 2, 3)), "label": jnp.array([3, 3, 3, 3, 3, 3, 0, 1])}
    _, metrics = make_train_step(model, optimizer, config)(state, batch)
    # dropped images have equal logits, and with a tie the first class of many still counts as right
    assert 0.75 <= float(metrics["top1"]) <= 1.0


@pytest.mark.parametrize("parts", [2, 8])
def test_accumulated_gradients_give_the_step_of_the_whole_batch(parts):
    class Plain(Linear):
        def __call__(self, images, *, rngs=None):
            return images.reshape(len(images), -1) @ self.kernel[...]

    def run(config):
        model = Plain()
        optimizer = make_optimizer(config, steps_per_epoch=3)
        step = jax.jit(make_train_step(model, optimizer, config))
        state = make_state(nnx.to_pure_dict(nnx.state(model, nnx.Param)), optimizer, config)
        told = []
        for _ in range(3):
            state, metrics = step(state, _batch())
            told.append([float(metrics["loss"]), float(metrics["top1"])])
        return told, state["params"]["kernel"]

    with jax.enable_x64(True):
        whole, kernel = run(_config())
        accumulated, other = run(_config(grad_accum=parts))
    np.testing.assert_allclose(accumulated, whole, rtol=1e-6)
    np.testing.assert_allclose(other, kernel, rtol=1e-5)


def test_the_parts_of_a_batch_drop_by_chances_of_their_own():
    config = _config(grad_accum=2, mixup=0.0, cutmix=0.0)
    drawn = []

    class Recorder(Linear):
        def __call__(self, images, *, rngs=None):
            drawn.append(jax.random.uniform(rngs.dropout(), ()))
            jax.debug.callback(lambda x: draws.append(float(x)), drawn[-1])
            return super().__call__(images, rngs=rngs)

    draws: list[float] = []
    model = Recorder()
    optimizer = make_optimizer(config, steps_per_epoch=3)
    state = make_state(nnx.to_pure_dict(nnx.state(model, nnx.Param)), optimizer, config)
    jax.block_until_ready(jax.jit(make_train_step(model, optimizer, config))(state, _batch()))
    jax.effects_barrier()
    assert len(set(draws)) == 2


def test_the_average_of_the_weights_is_timms():
    config = _config(ema_decay=0.7)
    model = Linear()
    optimizer = make_optimizer(config, steps_per_epoch=3)
    step = jax.jit(make_train_step(model, optimizer, config))
    state = make_state(nnx.to_pure_dict(nnx.state(model, nnx.Param)), optimizer, config)
    twin = torch.nn.Linear(12, _CLASSES, bias=False)
    twin.weight.data = torch.tensor(np.asarray(state["params"]["kernel"]).T.copy())
    reference = ModelEmaV3(twin, decay=0.7)
    for updates in range(1, 6):
        state, _ = step(state, _batch())
        twin.weight.data = torch.tensor(np.asarray(state["params"]["kernel"]).T.copy())
        reference.update(twin, step=updates)  # as train.py calls it
        if updates == 1:
            np.testing.assert_array_equal(state["ema"]["kernel"], state["params"]["kernel"])
    expected = reference.module.weight.detach().numpy().T
    np.testing.assert_allclose(state["ema"]["kernel"], expected, rtol=1e-5, atol=1e-6)
    assert np.abs(expected - state["params"]["kernel"]).max() > 1e-3


def test_a_frozen_backbone_stays_while_the_heads_learn(small_variant):
    config = _config(freeze_backbone=True, image_size=48, image_scale=(1.0, 2 / 3))
    model = abstract_model(classification(config, _CLASSES), config)
    optimizer = make_optimizer(config, steps_per_epoch=1, no_weight_decay=model.no_weight_decay())
    state = init_state(config, _CLASSES, optimizer, make_mesh())
    images = jax.random.normal(jax.random.key(0), (8, 48, 48, 3))
    batch = {"image": images, "label": jnp.arange(8, dtype=jnp.int32) % _CLASSES}
    new, _ = jax.jit(make_train_step(model, optimizer, config))(state, batch)
    moments = jax.tree.leaves(state["opt"])
    assert sum(x.size for x in moments) < 3 * sum(x.size for x in jax.tree.leaves(state["params"]["head"]))
    for name, part in new["params"].items():
        for old, now in zip(jax.tree.leaves(state["params"][name]), jax.tree.leaves(part), strict=True):
            assert np.array_equal(old, now) == (name != "head")


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"grad_checkpointing": True}, {"precision": "bfloat16"}])
def test_what_saves_memory_or_time_changes_the_loss_by_rounding_only(small_variant, changes):
    def loss(config):
        model = abstract_model(classification(config, _CLASSES), config)
        optimizer = make_optimizer(config, steps_per_epoch=1)
        state = init_state(config, _CLASSES, optimizer, make_mesh())
        images = jax.random.normal(jax.random.key(0), (8, 48, 48, 3))
        batch = {"image": images, "label": jnp.arange(8, dtype=jnp.int32) % _CLASSES}
        step = jax.jit(make_train_step(model, optimizer, config)).lower(state, batch)
        state, metrics = step.compile()(state, batch)
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state["params"]))
        return float(metrics["loss"]), step.as_text()

    plain = _config(image_size=48, image_scale=(1.0, 2 / 3), drop_path=0.0)
    expected, program = loss(plain)
    changed, other_program = loss(dataclasses.replace(plain, **changes))
    assert changed == pytest.approx(expected, rel=5e-3 if "precision" in changes else 1e-6)
    assert ("bf16" in other_program) == ("precision" in changes)
    assert program != other_program


def test_a_step_writes_the_new_state_over_the_old_one():
    config, model = _config(ema_decay=0.9), Linear()
    optimizer = make_optimizer(config, steps_per_epoch=3)
    state = make_state(nnx.to_pure_dict(nnx.state(model, nnx.Param)), optimizer, config)
    step = jit_train_step(make_train_step(model, optimizer, config), make_mesh(), state)
    planned = step.lower(state, _batch()).compile().memory_analysis()
    parameters, whole = (sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (state["params"], state))
    assert planned.alias_size_in_bytes == whole > 4 * parameters  # two moments, the average, and a few counters


def test_images_that_could_not_be_read_are_counted():
    config, model = _config(), Linear()
    optimizer = make_optimizer(config, steps_per_epoch=3)
    state = make_state(nnx.to_pure_dict(nnx.state(model, nnx.Param)), optimizer, config)
    batch = _batch() | {"bad": jnp.array([-1, 7, -1, -1, 0, -1, -1, -1])}
    assert make_train_step(model, optimizer, config)(state, batch)[1]["bad"] == 2


def test_making_a_step_leaves_the_models_mode_alone():
    model = Linear()
    make_eval_step(model)
    assert not model.deterministic
    model.eval()
    make_train_step(model, make_optimizer(_config(), steps_per_epoch=1), _config())
    assert model.deterministic


def test_evaluation_sums_over_the_unmasked_images_only():
    model, batch = Linear(), _batch(12)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    model.eval()
    logits = np.asarray(model(batch["image"]))[:9]
    labels = np.asarray(batch["label"])[:9]
    broken = batch["image"].at[9:].set(jnp.nan)
    mask = (jnp.arange(12) < 9).astype(jnp.float32)
    outputs = jax.jit(make_eval_step(model))(params, {**batch, "image": broken, "mask": mask})
    order = np.argsort(-logits, axis=1)
    expected = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(labels).long(), reduction="sum")
    sums = outputs["sums"]
    assert float(sums["loss"]) == pytest.approx(float(expected), rel=1e-5)
    assert float(sums["top1"]) == np.sum(order[:, 0] == labels)
    assert float(sums["top5"]) == np.sum(order[:, :5] == labels[:, None])
    np.testing.assert_array_equal(outputs["mask"], mask)
    np.testing.assert_array_equal(outputs["predicted"][:9], order[:, 0])


@pytest.mark.parametrize(("classes", "told"), [(5, False), (6, True)])
def test_top5_is_told_from_six_classes_on(classes, told):
    model = Linear(classes)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    batch = {"image": jnp.ones((2, 2, 2, 3)), "label": jnp.array([0, 1]), "mask": jnp.ones(2)}
    assert ("top5" in make_eval_step(model)(params, batch)["sums"]) == told


def test_broken_logits_are_not_counted_as_right():
    logits = jnp.array([[jnp.nan] * 3, [0.0, jnp.nan, 1.0], [0.0, 2.0, 1.0]])
    np.testing.assert_array_equal(within_top(1, logits, jnp.array([0, 2, 1])), [False, False, True])


@pytest.mark.parametrize("changes", [{}, {"ema_decay": 0.9}, {"freeze_backbone": True}, {"precision": "bfloat16"}])
def test_the_shapes_of_a_new_state_can_be_told_without_it(small_variant, changes):
    config = _config(image_size=48, image_scale=(1.0, 2 / 3), **changes)
    task, optimizer = classification(config, _CLASSES), make_optimizer(config, steps_per_epoch=1)
    model = abstract_model(task, config)
    shapes = abstract_state(model, optimizer, config)
    mesh = make_mesh()
    shardings = state_shardings(shapes, mesh)
    made = lower_init(task, model, optimizer, config, mesh, shardings)()
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), made) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), shapes
    )
    params = jax.device_get(made["params"])
    around = lower_init(task, model, optimizer, config, mesh, shardings, params)
    jax.tree.map(np.testing.assert_array_equal, around(), made)


def test_initial_weights_follow_the_seed_and_need_no_arrays_before(small_variant):
    config = _config(image_size=48, image_scale=(1.0, 2 / 3))
    optimizer = make_optimizer(config, steps_per_epoch=1)
    model = abstract_model(classification(config, _CLASSES), config)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.state(model)))
    first, again, other = (
        init_state(dataclasses.replace(config, seed=seed), _CLASSES, optimizer, make_mesh()) for seed in (0, 0, 1)
    )
    jax.tree.map(np.testing.assert_array_equal, first, again)
    kernels = [state["params"]["head"][0]["kernel"] for state in (first, other)]
    assert not np.array_equal(*kernels)
    assert first["step"] == 0
