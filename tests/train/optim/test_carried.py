"""A training that is begun in torch and goes on here, or the other way round, ends where either would have ended."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from timm.loss import SoftTargetCrossEntropy
from timm.models import resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver, ModelEmaV3

from convert.__main__ import main
from convert.metadata import describe
from convert.models import flax_model
from convert.training.torch_checkpoint import read_torch_checkpoint
from convert.tree import flatten, nest
from convert.weights import Weights
from tests.small_model import small_config
from tests.train.small_weights import small_timm_model
from tests.train.steps import make_train_step
from train.config import TrainConfig
from train.devices.mesh import make_mesh, replicated
from train.optim.carried import carry
from train.optim.loss_scale import initial_loss_scale
from train.optim.optimizer import make_optimizer
from train.optim.state import make_state
from train.run.checkpoints import Checkpoints
from train.run.folder import describe_run, write_config
from train.run.run_state import RunState

_CLASSES, _BATCH, _STEPS = 3, 4, 3  # steps in either framework: an epoch
_DECAY = 0.9
_BOUND = {"float64": 1e-11, "float32": 5e-5}


def _config(optimizer: str) -> TrainConfig:
    return TrainConfig(
        variant="ti",
        image_size=48,
        image_scale=(1.0, 2 / 3),
        optimizer=optimizer,
        lr=1e-3,
        lr_batch_size=_BATCH,
        batch_size=_BATCH,
        lr_schedule="constant",
        warmup_epochs=0,
        epochs=2,
        mixup=0.0,
        cutmix=0.0,
        drop_path=0.0,
        ema_decay=_DECAY,
    )


def _batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(step)
    return rng.standard_normal((_BATCH, 3, 48, 48)), rng.integers(_CLASSES, size=_BATCH)


class _Torch:
    """timm's model, optimiser, average and files."""

    def __init__(self, optimizer: str, dtype: str):
        config = _config(optimizer)
        self.dtype = getattr(torch, dtype)
        self.model = small_timm_model(_CLASSES).to(self.dtype).train()
        self.optimizer = create_optimizer_v2(
            self.model, optimizer, lr=config.peak_lr, weight_decay=config.weight_decay, momentum=config.momentum
        )
        self.average = ModelEmaV3(self.model, decay=_DECAY)

    def train(self, steps: range) -> "_Torch":
        for step in steps:
            images, labels = _batch(step)
            targets = 0.9 * np.eye(_CLASSES)[labels] + 0.1 / _CLASSES  # timm's own are float32
            targets = torch.tensor(targets, dtype=self.dtype)
            loss = SoftTargetCrossEntropy()(self.model(torch.tensor(images, dtype=self.dtype)), targets)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.average.update(self.model, step=step + 1)
        return self

    def save(self, folder, epoch: int = 0):
        saver = CheckpointSaver(self.model, self.optimizer, model_ema=self.average, checkpoint_dir=str(folder))
        saver.save_checkpoint(epoch)
        return folder / "last.pth.tar"

    def weights(self) -> tuple[dict, dict]:
        return tuple(
            {name: x.detach().numpy() for name, x in m.state_dict().items()} for m in (self.model, self.average.module)
        )


class _Flax:
    """Our state and step, and a run's folder as the loop writes it."""

    def __init__(self, optimizer: str, dtype: str, tensors: dict):
        self.config, self.dtype = _config(optimizer), dtype
        self._model_config = small_config(_CLASSES)
        model = flax_model(Weights(config=self._model_config, tensors=tensors), param_dtype=dtype)
        optimiser = make_optimizer(self.config, steps_per_epoch=_STEPS, no_weight_decay=model.no_weight_decay())
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        self.state = jax.device_put(make_state(params, optimiser, self.config), replicated(make_mesh()))
        self._step = jax.jit(make_train_step(model, optimiser, self.config))

    def train(self, steps: range) -> "_Flax":
        for step in steps:
            images, labels = _batch(step)
            images = jnp.asarray(images.transpose(0, 2, 3, 1), self.dtype)
            self.state, _ = self._step(self.state, {"image": images, "label": jnp.asarray(labels, jnp.int32)})
        return self

    def save(self, folder):
        folder.mkdir()
        model = describe(self._model_config, None)
        described = describe_run(self.config, model=model, data={"steps_per_epoch": _STEPS})
        write_config(folder, described)
        checkpoints = Checkpoints(folder, description=model, say=print)
        checkpoints.save(self.state, RunState(int(self.state["step"]), lr=self.config.peak_lr), described)
        checkpoints.wait()
        checkpoints.close()
        return folder

    def weights(self) -> tuple[dict, dict]:
        return flatten(self.state["params"]), flatten(self.state["ema"])


def _assert_near(ours: tuple, theirs: tuple, bound: float) -> None:
    for ours_part, theirs_part in zip(ours, theirs, strict=True):
        assert ours_part.keys() == theirs_part.keys()
        errors = {name: np.abs(_moved(name, ours_part[name] - x)).max() for name, x in theirs_part.items()}
        worst = max(errors, key=errors.get)
        assert errors[worst] <= bound, worst


def _moved(name: str, difference: np.ndarray) -> np.ndarray:
    """Without the biases of keys: their gradient is 0, and Adam makes steps of its rounding error."""
    if name.endswith("wk.bias"):
        return np.zeros(1)
    return difference.reshape(3, -1)[[0, 2]] if name.endswith("qkv.bias") else difference


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_half_a_training_in_either_framework_ends_as_the_whole_in_torch(
    small_variant, tmp_path, capsys, optimizer, dtype
):
    begin, end = range(_STEPS), range(_STEPS, 2 * _STEPS)
    torch_run = _Torch(optimizer, dtype)
    start = {name: x.clone().numpy() for name, x in torch_run.model.state_dict().items()}
    last = torch_run.train(begin).save(tmp_path)
    torch_run.train(end)
    with jax.enable_x64(dtype == "float64"):
        # begun in torch
        carried = read_torch_checkpoint(last)
        assert (carried.epochs, carried.updates) == (1, _STEPS if optimizer == "adamw" else None)
        ours = _Flax(optimizer, dtype, dict(carried.weights.tensors))
        fresh = ours.state
        ours.state = carry(fresh, carried, step=_STEPS)
        assert int(ours.state["step"]) == _STEPS
        scale = jax.device_put(initial_loss_scale(), replicated(make_mesh()))
        scaled = carry({**fresh, "loss_scale": scale}, carried, step=_STEPS)
        assert int(scaled["loss_scale"].updates) == _STEPS  # no step is the first, which would begin a new average
        again = ours.save(tmp_path / "again")  # and back without a step between
        _assert_near(ours.train(end).weights(), torch_run.weights(), _BOUND[dtype])
        # begun here
        ours.state = {**fresh, "params": jax.tree.map(jnp.asarray, nest(start))}
        run = ours.train(begin).save(tmp_path / "run")
    assert main([str(run), str(tmp_path / "begun.pth.tar"), "--training"]) == 0
    assert "not in it: the order of the images" in capsys.readouterr().out
    theirs = _Torch(optimizer, dtype)
    assert resume_checkpoint(theirs.model, str(tmp_path / "begun.pth.tar"), theirs.optimizer) == 1
    held = torch.load(tmp_path / "begun.pth.tar", weights_only=True)
    theirs.average.module.load_state_dict(held["state_dict_ema"])
    _assert_near(theirs.train(end).weights(), torch_run.weights(), _BOUND[dtype])

    assert main([str(again), str(tmp_path / "again.pth.tar"), "--training"]) == 0
    before, after = (torch.load(path, weights_only=True) for path in (last, tmp_path / "again.pth.tar"))
    for key in ("state_dict", "state_dict_ema"):
        assert [*before[key]] == [*after[key]]
        assert all(torch.equal(before[key][name], tensor) for name, tensor in after[key].items())
    assert before["epoch"] == after["epoch"] == 0
    for old, new in zip(*(held["optimizer"]["param_groups"] for held in (before, after)), strict=True):
        assert old == {key: value for key, value in new.items() if key != "initial_lr"}
    old, new = (held["optimizer"]["state"] for held in (before, after))
    assert old.keys() == new.keys()
    for index, entry in old.items():
        assert entry.keys() == new[index].keys()
        assert all(torch.equal(value, new[index][name]) for name, value in entry.items())
