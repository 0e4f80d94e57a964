"""A task that is no classification runs through the same step, loop, log, curves and checkpoints."""

import dataclasses
import json
from contextlib import closing
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from train.config import TrainConfig
from train.data.datasets import open_digits
from train.devices.mesh import make_mesh
from train.images.transforms import eval_transform, train_transform
from train.job import Job
from train.loop import train
from train.optim.programs import Plan, Programs
from train.recipes import RECIPES
from train.run.checkpoints import Checkpoints
from train.tasks.task import Metric

_STEPS_PER_EPOCH, _BATCH = 5, 40


class Brightness(nnx.Module):
    """Tells how bright an image is from the means of its channels."""

    def __init__(self, rngs):
        self.weights = nnx.Param(jax.random.normal(rngs.params(), (3,)))

    def __call__(self, images):
        return images.mean((1, 2)) @ self.weights[...]

    def no_weight_decay(self):
        return set()

    def layer_of(self, name):
        return 0

    def is_head(self, name):
        return True


@dataclass(frozen=True)
class Estimation:
    """The brightness of digits. It counts the images that it was trained on, as a state of its own."""

    config: TrainConfig
    metrics = (Metric("error", "mean error", better="min"),)

    def headline(self):
        return "the brightness of digits"

    def model(self, *, dtype, rngs):
        return Brightness(rngs)

    def save(self, params, path, *, origin=None):
        path.write_text(str(np.asarray(params["weights"])))

    def transform(self, *, training):
        model_config = self.config.model_config(10)
        return train_transform(self.config, model_config) if training else eval_transform(model_config)

    def batch_shapes(self, batch_size, *, training):
        shapes = {
            "image": jax.ShapeDtypeStruct((batch_size, 24, 24, 3), jnp.float32 if training else jnp.uint8),
            "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
        }
        return shapes if training else shapes | {"mask": jax.ShapeDtypeStruct((batch_size,), jnp.float32)}

    def prepare(self, batch, key):
        return {"image": batch["image"], "brightness": batch["image"].mean((1, 2, 3))}

    def extra(self, params):
        return {"trained": jnp.zeros((), jnp.int32)}

    def loss(self, model, batch, extra, *, rngs):
        error = model(batch["image"]) - batch["brightness"]
        return jnp.mean(error**2), {"error": jnp.mean(jnp.abs(error)), "images": jnp.float32(len(error))}

    def update(self, extra, aux, params, step):
        parts = self.config.grad_accum  # of which `aux` is the mean
        return {"trained": extra["trained"] + parts * aux["images"].astype(jnp.int32)}

    def evaluate(self, model, batch):
        error = jnp.abs(model(batch["image"]) - batch["image"].mean((1, 2, 3)))
        return {"error": jnp.sum(error * batch["mask"]), "images": jnp.sum(batch["mask"])}

    def draw_batch(self, batch, path):
        path.write_text(str(batch["image"].shape))

    def draw_outputs(self, batch, outputs, path):
        path.write_text(f"{batch['image'].shape} {sorted(outputs)}")

    def scores(self, source):
        return _Errors()


class _Errors:
    def __init__(self):
        self.error = self.images = 0.0

    def add(self, outputs):
        self.error, self.images = self.error + float(outputs["error"]), self.images + float(outputs["images"])

    def values(self):
        return {"images": self.images, "loss": (self.error / self.images) ** 2, "error": self.error / self.images}


def _job(sets, folder, epochs, *, resumed):
    settings = {
        "image_size": 24,
        "epochs": epochs,
        "batch_size": _BATCH,
        "grad_accum": 2,
        "lr": 0.01,
        "warmup_epochs": 0,
    }
    machine = {"augment_on": "host", "precision": "float32", "output": str(folder)}
    config = dataclasses.replace(RECIPES["digits"], **settings, **machine)
    return Job(config, Estimation(config), sets, make_mesh(), None, {"model": {}}, resumed=resumed)


def test_another_task_is_trained_evaluated_and_continued_with_a_state_of_its_own(few_digits_dir, tmp_path, capsys):
    sets, folder = open_digits(few_digits_dir), tmp_path / "run"
    first = train(_job(sets, folder, 1, resumed=False))
    job = _job(sets, folder, 2, resumed=True)
    result = train(job)
    out = capsys.readouterr().out
    assert "continued after step 5 of 10" in out
    assert result.best.value == result.final["eval/error"] < first.final["eval/error"]  # less is better
    assert f"held-out mean error {result.best.value:.2f}, loss" in result.summary()
    assert f" | held-out loss {result.final['eval/loss']:.3f}, mean error {result.best.value:.2f} | " in out
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert set(lines[0]) == {"step", "epoch", "train/loss", "train/error", "train/lr", "train/bad_images"}
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "train_batch.png").read_text() == "(12, 24, 24, 3)"
    assert (folder / "predictions.png").read_text() == "(12, 24, 24, 3) ['error', 'images']"

    with (
        closing(Programs(Plan(job.task, job.config, job.mesh, _STEPS_PER_EPOCH))) as programs,
        closing(Checkpoints(folder, description={}, say=print)) as checkpoints,
    ):
        state, remembered = checkpoints.restore(programs.state)
    assert (remembered.step, int(state["extra"]["trained"])) == (10, 10 * _BATCH)
    assert remembered.meter["epoch"].keys() == {"loss", "error", "bad", "steps"}
