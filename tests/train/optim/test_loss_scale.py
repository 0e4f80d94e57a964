"""float16 with loss scaling: torch's GradScaler, and steps that are skipped and change nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from tests.train.optim.test_step import Linear
from tests.train.steps import make_train_step
from train.config import TrainConfig
from train.devices.mesh import default_precision, precision_note
from train.optim.loss_scale import LossScale, initial_loss_scale, next_loss_scale
from train.optim.optimizer import make_optimizer
from train.optim.state import State, make_state

_CLASSES, _STEPS, _OVERFLOWS = 7, 20, (0, 1, 9)  # the first, before any update, and a later one


def _config(**changes) -> TrainConfig:
    settings = {
        "epochs": 20,
        "warmup_epochs": 2,
        "lr": 1e-2,
        "lr_batch_size": 8,
        "batch_size": 8,
        "mixup": 0,
        "cutmix": 0,
    }
    settings |= {"smoothing": 0, "precision": "float16", "ema_decay": 0.9, "weight_decay": 0.05, "clip_grad": 1.0}
    return TrainConfig(**settings | changes)


def _batch(step: int, *, overflows=_OVERFLOWS) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    images = rng.normal(size=(8, 2, 2, 3)).astype(np.float32)
    if step in overflows:
        images *= 1e37  # the loss is finite, its gradient 65,536 times larger is not
    return {"image": images, "label": rng.integers(0, _CLASSES, 8).astype(np.int32)}


def _start(config) -> tuple[Linear, State, object]:
    model = Linear()
    model.eval()  # nothing dropped
    optimizer = make_optimizer(config, steps_per_epoch=1)
    params = jax.tree.map(lambda x: x * 1e-2, nnx.to_pure_dict(nnx.state(model, nnx.Param)))

    class Whole(Linear):
        def __call__(self, images, *, rngs=None):
            return images.reshape(len(images), -1) @ self.kernel[...]

    step = jax.jit(make_train_step(Whole(), optimizer, config))
    return params, make_state(params, optimizer, config), step


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_twenty_steps_with_overflows_are_torchs(optimizer):
    config = _config(optimizer=optimizer)
    params, state, step = _start(config)
    kernel = torch.nn.Parameter(torch.tensor(np.asarray(params["kernel"])))
    if optimizer == "adamw":
        theirs = torch.optim.AdamW([kernel], lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05)
    else:
        theirs = torch.optim.SGD([kernel], lr=1.0, momentum=0.9, nesterov=True, weight_decay=0.05)
    scaler = torch.amp.GradScaler("cpu")
    learning_rate, average = _learning_rates(config), None
    for number in range(_STEPS):
        batch = _batch(number)
        state, metrics = step(state, jax.tree.map(jnp.asarray, batch))
        theirs.param_groups[0]["lr"] = learning_rate(number)
        images, labels = torch.tensor(batch["image"]).reshape(8, -1), torch.tensor(batch["label"]).long()
        loss = torch.nn.functional.cross_entropy(images @ kernel, labels)
        theirs.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(theirs)
        torch.nn.utils.clip_grad_norm_([kernel], 1.0)
        before = scaler.get_scale()
        scaler.step(theirs)
        scaler.update()
        skipped = scaler.get_scale() < before
        assert (bool(metrics["skipped"]), float(metrics["loss_scale"])) == (skipped, before)
        assert skipped == (number in _OVERFLOWS)
        if not skipped:
            average = kernel.detach().clone() if average is None else average + 0.1 * (kernel.detach() - average)
    np.testing.assert_allclose(state["params"]["kernel"], kernel.detach(), rtol=0, atol=2e-6)
    np.testing.assert_allclose(state["ema"]["kernel"], average, rtol=0, atol=2e-6)
    factor, good_steps, updates = (float(x) for x in state["loss_scale"])
    assert factor == scaler.get_scale() == 2**13
    assert (good_steps, updates) == (scaler.state_dict()["_growth_tracker"], 17)
    assert int(state["step"]) == _STEPS
    if optimizer == "adamw":
        (moments,) = (part for part in state["opt"] if isinstance(part, optax.ScaleByAdamState))
        told = theirs.state[kernel]
        assert int(moments.count) == int(told["step"]) == 17
        np.testing.assert_allclose(moments.mu["kernel"], told["exp_avg"], rtol=0, atol=1e-6)
        np.testing.assert_allclose(moments.nu["kernel"], told["exp_avg_sq"], rtol=0, atol=1e-7)


def _learning_rates(config):
    from train.optim.schedule import make_schedule

    schedule = make_schedule(config, steps_per_epoch=1)
    return lambda step: float(schedule(step))


def test_a_skipped_step_changes_nothing_but_its_number_and_the_scale():
    _, state, step = _start(_config())
    state, _ = step(state, jax.tree.map(jnp.asarray, _batch(5)))
    after, metrics = step(state, jax.tree.map(jnp.asarray, _batch(1)))
    assert metrics["skipped"] == 1
    assert (int(after["step"]), float(after["loss_scale"].factor)) == (2, 2**15)
    kept = [entry for entry in ("params", "ema") for entry in (state[entry], after[entry])]
    for old, new in (kept[:2], kept[2:]):
        jax.tree.map(np.testing.assert_array_equal, old, new)
    for old, new in zip(state["opt"], after["opt"], strict=True):
        if isinstance(old, optax.ScaleByScheduleState):
            assert int(new.count) == int(old.count) + 1  # torch's schedulers go on, too
        else:
            jax.tree.map(np.testing.assert_array_equal, old, new)


def test_accumulated_parts_are_skipped_together():
    _, state, step = _start(_config(grad_accum=4))
    for number, skipped in ((0, True), (2, False)):
        state, metrics = step(state, jax.tree.map(jnp.asarray, _batch(number)))
        assert bool(metrics["skipped"]) == skipped
    _, whole, step = _start(_config())
    for number in (0, 2):
        whole, _ = step(whole, jax.tree.map(jnp.asarray, _batch(number)))
    np.testing.assert_allclose(state["params"]["kernel"], whole["params"]["kernel"], rtol=0, atol=1e-7)


def test_the_scale_doubles_after_2000_good_steps_as_torchs():
    scaler = torch.amp.GradScaler("cpu")
    scaler.load_state_dict(scaler.state_dict() | {"_growth_tracker": 1998})
    scale = LossScale(jnp.float32(2**16), jnp.int32(1998), jnp.int32(5))
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for number, finite in enumerate((True, True, True, False, True)):
        scaler.scale(weight.sum()).backward()
        weight.grad *= 1.0 if finite else float("inf")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scale = next_loss_scale(scale, finite=jnp.bool_(finite))
        told = (scaler.get_scale(), scaler.state_dict()["_growth_tracker"])
        assert (float(scale.factor), int(scale.good_steps)) == told, number
    assert float(scale.factor) == 2**16
    largest = LossScale(jnp.float32(2.0**127), jnp.int32(1999), jnp.int32(0))
    assert float(next_loss_scale(largest, finite=jnp.bool_(True)).factor) == 2.0**127  # not infinite


def test_only_float16_has_a_scale():
    for precision in ("float32", "bfloat16"):
        _, state, step = _start(_config(precision=precision))
        assert "loss_scale" not in state
        assert "skipped" not in step(state, jax.tree.map(jnp.asarray, _batch(2)))[1]
    assert initial_loss_scale().factor == 2**16


@dataclasses.dataclass(frozen=True)
class _Device:
    platform: str
    compute_capability: str | None = None
    device_kind: str = "some device"


@pytest.mark.parametrize(
    ("device", "precision"),
    [
        (_Device("cpu"), "float32"),
        (_Device("tpu"), "bfloat16"),
        (_Device("gpu", "7.5"), "float16"),
        (_Device("gpu", "8.0"), "bfloat16"),
        (_Device("gpu", "12.0"), "bfloat16"),
        (_Device("gpu", "gfx90a"), "bfloat16"),
    ],
)
def test_the_arithmetic_is_what_the_devices_have(device, precision):
    class Mesh:
        devices = np.array([device, device])

    assert default_precision(Mesh) == precision
    notes = [precision_note(chosen, Mesh) for chosen in ("float16", "bfloat16", "float32")]
    if device.compute_capability == "7.5":
        assert notes[0] == ["some device has no bfloat16: this is float16"]
        assert "computes it in float32, slowly: choose precision float16" in notes[1][0]
        assert notes[2] == []
    else:
        assert notes == [[], [], []]


def test_a_whole_model_learns_in_float16():
    from crossvit_jax import CrossViT
    from tests.train.small_weights import small_config

    config = _config(lr=1e-2, warmup_epochs=0, clip_grad=None)
    model = CrossViT(small_config(_CLASSES), dtype=jnp.float16, rngs=nnx.Rngs(0))
    optimizer = make_optimizer(config, steps_per_epoch=10)
    state = make_state(nnx.to_pure_dict(nnx.state(model, nnx.Param)), optimizer, config)
    step = jax.jit(make_train_step(model, optimizer, config))
    batch = {"image": jax.random.normal(jax.random.key(0), (8, 48, 48, 3)), "label": jnp.arange(8) % _CLASSES}
    losses = []
    for _ in range(20):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert {leaf.dtype for leaf in jax.tree.leaves(state["params"])} == {jnp.dtype("float32")}
    assert losses[-1] < losses[0] - 0.3


def test_an_average_that_was_begun_elsewhere_goes_on_after_the_first_good_step():
    """As of a training of timm's that goes on here: its scale is new, and its average is not."""
    _, state, step = _start(_config(ema_decay=0.5))
    state["step"] = jnp.int32(7)
    state["loss_scale"] = state["loss_scale"]._replace(updates=jnp.int32(7))
    before = state["ema"] = {"kernel": state["ema"]["kernel"] + 1}
    after, _ = step(state, jax.tree.map(jnp.asarray, _batch(2)))
    expected = (before["kernel"] + after["params"]["kernel"]) / 2
    np.testing.assert_allclose(after["ema"]["kernel"], expected, rtol=0, atol=1e-6)
