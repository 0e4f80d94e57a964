"""Detection and segmentation with models that compile at once, and batches for them.

As a program: by how much gradient accumulation, and two devices, change three steps, in JSON.
"""

import dataclasses
import json
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.small_model import small_detector, small_segmenter
from train.config import TrainConfig
from train.devices.mesh import make_mesh
from train.optim.optimizer import make_optimizer
from train.optim.state import make_state
from train.optim.step import jit_train_step, make_train_step
from train.recipes import RECIPES
from train.tasks.detection import Detection
from train.tasks.segmentation import Segmentation

SIDE = 48


class Detector(nnx.Module):
    """A detector without a body: its outputs are products with the pixels of a coarse image."""

    def __init__(self, points: int, classes: int, dtype):
        rng = np.random.default_rng(0)
        shape = (SIDE // 8) ** 2 * 3, points, classes + 5
        self.kernel = nnx.Param(jnp.asarray(rng.normal(0, 0.3, shape), dtype))

    def __call__(self, images, *, rngs=None):
        batch = len(images)
        coarse = images.reshape(batch, SIDE // 8, 8, SIDE // 8, 8, 3).mean((2, 4)).reshape(batch, -1)
        x = jnp.einsum("bi,ipo->bpo", coarse, self.kernel[...])
        return {
            "bbox_regression": jax.nn.softplus(x[..., :4]),
            "bbox_ctrness": x[..., 4:5],
            "cls_logits": x[..., 5:],
        }


class Segmenter(nnx.Module):
    """A segmenter without a body: each pixel for itself."""

    def __init__(self, classes: int, dtype):
        self.kernel = nnx.Param(jnp.asarray(np.random.default_rng(0).normal(size=(3, classes)), dtype))

    def __call__(self, images, *, rngs=None):
        return images @ self.kernel[...]


def make_task(kind: str, **settings) -> Detection | Segmentation:
    """The task with the settings of its scenes, but for plain cross-entropy in segmentation."""
    config = settings_of(kind, **settings)
    if kind == "detection":
        return Detection(
            config, small_detector(SIDE, strides=(6, 12, 24)), ("a", "b", "c"), most_boxes=4, category_ids=(7, 3, 90)
        )
    return Segmentation(config, small_segmenter(SIDE), ("a", "b", "c", "d"))


def settings_of(kind: str, **settings) -> TrainConfig:
    common = {"batch_size": 8, "epochs": 2, "warmup_epochs": 0, "precision": "float32"}
    common |= {"dice": 0.0} if kind == "segmentation" else {}
    return dataclasses.replace(RECIPES[f"{kind}-digits"], **common | settings)


def make_model(task: Detection | Segmentation, dtype=jnp.float32) -> nnx.Module:
    classes = task.model_config.num_classes
    if isinstance(task, Segmentation):
        return Segmenter(classes, dtype)
    return Detector(sum(rows * columns for rows, columns in task.model_config.level_grids), classes, dtype)


def make_batch(kind: str, dtype=jnp.float32, batch: int = 8) -> dict[str, jax.Array]:
    """Images with objects: the first few with many, the last with none."""
    rng = np.random.default_rng(1)
    images = jnp.asarray(rng.normal(size=(batch, SIDE, SIDE, 3)), dtype)
    if kind == "segmentation":
        segments = rng.integers(0, 4, (batch, SIDE, SIDE))
        ignored = rng.uniform(size=segments.shape) < np.linspace(0, 1, batch)[:, None, None]
        return {"image": images, "segments": jnp.asarray(np.where(ignored, 255, segments), jnp.uint8)}
    corners, sides = rng.uniform(0, 20, (batch, 4, 2)), rng.uniform(8, 26, (batch, 4, 2))
    present = np.arange(4) < np.linspace(4, 0, batch)[:, None]
    boxes = np.concatenate([corners, corners + sides], axis=-1) * present[..., None]
    classes = rng.integers(0, 3, (batch, 4)) * present
    return {
        "image": images,
        "boxes": jnp.asarray(boxes, jnp.float32),
        "classes": jnp.asarray(classes, jnp.int32),
        "present": jnp.asarray(present),
    }


def after_steps(kind: str, dtype, *, devices: int = 1, **settings) -> tuple[list[float], np.ndarray]:
    """The losses of three steps, and the weights then."""
    task = make_task(kind, **settings)
    model = make_model(task, dtype)
    optimizer = make_optimizer(task.config, steps_per_epoch=3)
    mesh = make_mesh(devices=jax.devices()[:devices])
    state = make_state(nnx.to_pure_dict(nnx.state(model, nnx.Param)), optimizer, task.config)
    step = jit_train_step(make_train_step(model, task, optimizer, task.config), mesh, state)
    losses = []
    for _ in range(3):
        state, metrics = step(state, make_batch(kind, dtype))
        losses.append(float(metrics["loss"]))
    return losses, np.asarray(state["params"]["kernel"])


def _differences() -> Iterator[tuple[str, list[float]]]:
    for kind in ("detection", "segmentation"):
        losses, kernel = after_steps(kind, jnp.float64)
        for name, settings in {"grad_accum": {"grad_accum": 4}, "mesh": {"devices": 2}}.items():
            found, other = after_steps(kind, jnp.float64, **settings)
            yield (
                f"{kind} {name}",
                [abs(a - b) / b for a, b in zip(found, losses, strict=True)]
                + [float(np.abs(other - kernel).max() / np.abs(kernel).max())],
            )


if __name__ == "__main__":
    print(json.dumps(dict(_differences())))
