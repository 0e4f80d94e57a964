"""What the sides of each benchmark are asked to run, as plain data, and what they offer to be timed.

A side is a name. Its process imports the module that loads it (`Task.loader`), and with it the side's framework: this
module imports no framework and no side.
"""

import contextlib
import dataclasses
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import psutil
from jaxtyping import Float32

from convert.files import FOLDER_PREFIX
from crossvit_jax.config import CrossViTConfig, DetectorConfig, get_config, get_dense_config
from train.config import TrainConfig
from train.recipes import RECIPES

CHECKED_STEPS = 2  # the loss of the second one also tells whether gradient and update were right
NEVER = 1_000_000_000  # steps per epoch, for which the learning rate stays that of the first one
SIZE = 240  # of the images that the data benchmark makes
PHOTOGRAPH_CLASSES = 10  # of the files that training is fed from; the model has its thousand
_OFTEN = -6.5  # see `DetectionTask.tensors`
_BOXES = 8  # of an image that a detector is trained with
_STEPS, _STEPS_PER_WORKER = 8, 4  # in a round of steps that are fed, at least

Images = Float32[np.ndarray, "batch height width 3"]


def usable_cores() -> int:
    """Those that this process may use; XLA has a thread for each."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def cpu_seconds(process: psutil.Process) -> float:
    """What a process and all that it began have worked."""
    worked = 0.0
    for one in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended
            worked += sum(one.cpu_times()[:4])  # as user and system, and that of children that have ended
    return worked


def jax_facts() -> dict[str, str]:
    """Version, threads and device of a side that computes with jax."""
    import jax

    return {"jax": jax.__version__, "jax threads": str(usable_cores()), "jax device": jax.devices()[0].device_kind}


@dataclass(frozen=True)
class Program:
    """A task, loaded and ready on one side."""

    # Arrays by name, in which the sides must agree: `logits`; of unmixed training steps `losses`, and of each parameter
    # the norm of what AdamW makes of its `gradients` (the first moment); `images` and `crops`.
    check: Callable[[], dict[str, np.ndarray]]
    run: Callable[[int], None]  # that many calls; returns when the results are there
    facts: dict[str, str]  # versions, threads, device
    # Is not timed; by default a call on a GPU, which takes again what `rest` gave back, and nothing on a CPU
    before_round: Callable[[], None] | None = None
    close: Callable[[], None] = lambda: None  # ends the processes that it started
    rest: Callable[[], None] = lambda: None  # between its turns: leaves unused device memory, and cores, to others
    warm_up_s: float = 3.0  # by then a process has the memory that it needs
    peak_bytes: Callable[[], int | None] = lambda: None  # the most device memory in use so far; None on a CPU
    flops: Callable[[], int] | None = None  # of the model in a call: see `train.cost.flops`
    peak_flops: Callable[[], float] | None = None  # measures the device's
    float32: Callable[[], Any] | None = None  # for a task in bfloat16: what `check` would give in float32


def repeated(call: Callable[[], Any], wait: Callable[[Any], Any] = lambda result: None) -> Callable[[int], None]:
    """The `run` of a program whose calls are all alike; the last result is waited for."""

    def run(calls: int) -> None:
        for _ in range(calls):
            result = call()
        wait(result)

    return run


@dataclass(frozen=True, kw_only=True)
class Task:
    """What all sides of a benchmark get alike."""

    SIDES: ClassVar[dict[str, str]]  # the modules in `benchmarks.sides` that load them
    batch_size: int
    dtype: str = "float32"
    device: str = "cpu"
    least_calls: ClassVar[int] = 1  # in a round

    def loader(self, side: str) -> str:
        """The name of the function that makes the side's `Program` from the task and the side's name."""
        return f"benchmarks.sides.{self.SIDES[side]}:load"

    def told(self) -> dict[str, Any]:
        """What a result says of it."""
        return {"batch_size": self.batch_size, "dtype": self.dtype, "device": self.device}


@dataclass(frozen=True, kw_only=True)
class ModelTask(Task):
    """One model, batch and precision: images to logits, or training steps."""

    SIDES: ClassVar = {"flax": "flax", "timm": "timm", "timm-compile": "timm"}
    benchmark: Literal["inference", "training"]
    variant: str
    weights: str  # a safetensors file with timm's names

    def told(self) -> dict[str, Any]:
        return {"benchmark": self.benchmark, "variant": self.variant} | super().told()

    def config(self) -> CrossViTConfig | DetectorConfig:
        """The model's settings."""
        return get_config(self.variant)

    def write_weights(self) -> None:
        """Random weights, as large as initial ones in biases and norms too.

        Fresh ones are 0 and 1 there, and would let mistakes pass the comparison.
        """
        from convert import save

        save(self.tensors(), self.config(), self.weights, overwrite=True)

    def tensors(self) -> dict[str, np.ndarray]:
        """The numbers of `write_weights`, by timm's names."""
        from convert.architecture import expected_shapes

        rng, tensors = np.random.default_rng(0), {}
        for name, shape in expected_shapes(self.config()).items():
            is_norm = len(shape) == 1 and name.endswith("weight")
            tensors[name] = np.float32(0.02) * rng.standard_normal(shape, np.float32) + np.float32(is_norm)
        return tensors

    def images(self) -> Images:
        """The same numbers in every process."""
        return np.random.default_rng(0).standard_normal((self.batch_size, *self.config().image_size, 3), np.float32)

    def labels(self) -> np.ndarray:
        """(batch,), int32."""
        return np.random.default_rng(1).integers(1000, size=self.batch_size, dtype=np.int32)

    def recipe(self) -> TrainConfig:
        """The paper's loss, mixing and decay, at a small constant learning rate: random images teach nothing.

        Odd batches are not mixed: timm mixes images in pairs.
        """
        changes = {"mixup": 0.0, "cutmix": 0.0} if self.batch_size % 2 else {}
        # drop path is off: each framework would drop other blocks, and the losses could not be compared
        changes |= {"lr": 1e-4, "warmup_epochs": 0, "drop_path": 0.0, "lr_batch_size": self.batch_size}
        return dataclasses.replace(RECIPES["imagenet"], batch_size=self.batch_size, **changes)


@dataclass(frozen=True, kw_only=True)
class EndToEndTask(ModelTask):
    """Training steps that are fed from JPEG files, beside the same steps alone, whose batch lies on the device."""

    SIDES: ClassVar = {"flax": "flax", "flax-device": "fed_flax", "flax-host": "fed_flax", "timm": "timm"} | {
        "timm-loader": "fed_timm"
    }
    benchmark: Literal["training"] = "training"
    folder: str  # of the photographs, see `benchmarks.end_to_end.write_photographs`
    files: int
    workers: int  # processes that read and augment

    @property
    def least_calls(self) -> int:
        """Several batches of each worker, for they come in bursts: what was read ahead flatters nobody."""
        return max(_STEPS, _STEPS_PER_WORKER * self.workers)

    def told(self) -> dict[str, Any]:
        return super().told() | {"files": self.files, "workers": self.workers}

    def fed_recipe(self, augment_on: str) -> TrainConfig:
        """The settings of the trainer."""
        data = {"dataset": FOLDER_PREFIX + self.folder, "workers": self.workers, "augment_on": augment_on}
        return dataclasses.replace(self.recipe(), variant=self.variant, **data)


@dataclass(frozen=True, kw_only=True)
class DetectionTask(ModelTask):
    """A detector, in a file of ours: images to boxes, or training steps."""

    SIDES: ClassVar = dict.fromkeys(("torchvision", "torchvision-compile"), "torchvision_detection") | {
        "flax": "flax_detection"
    }

    def config(self) -> DetectorConfig:
        """For COCO's classes."""
        return get_dense_config("detection", self.variant, num_classes=80)

    def tensors(self) -> dict[str, np.ndarray]:
        """With a bias of classes for which about a thousand scores of an image are above 0.05."""
        tensors = super().tensors()
        tensors["head.classification_head.cls_logits.bias"] += _OFTEN
        return tensors

    def targets(self) -> dict[str, np.ndarray]:
        """Boxes of each image from large to small, whose areas torchvision tells apart in float32."""
        height, width = self.config().image_size
        rng, shape = np.random.default_rng(1), (self.batch_size, _BOXES)
        shares = np.geomspace(0.9, 0.1, _BOXES)[:, None] * rng.uniform(0.9, 1, (*shape, 2))
        sides = shares * [width, height]
        first = rng.uniform(size=sides.shape) * ([width, height] - sides)
        return {
            "boxes": np.concatenate([first, first + sides], axis=-1).astype(np.float32),
            "classes": rng.integers(self.config().num_classes, size=shape, dtype=np.int32),
            "present": np.ones(shape, bool),
        }

    def recipe(self) -> TrainConfig:
        """The trainer's for data of one's own, at a small constant learning rate, the same in all layers."""
        changes = {"lr": 1e-4, "warmup_epochs": 0, "layer_decay": 1.0, "clip_grad": None, "drop_path": 0.0}
        changes |= {"batch_size": self.batch_size, "lr_batch_size": self.batch_size, "precision": self.dtype}
        return dataclasses.replace(RECIPES["detection"], **changes)

    def found(self, images: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """What sides must agree in, of each image's boxes, labels and scores.

        Each coordinate is sorted by itself: boxes whose scores are equal but for rounding have no order.
        """
        told = np.zeros((len(images), 100, 6), np.float32)  # there are no more of an image
        for rows, found in zip(told, images, strict=True):
            rows[: len(found["boxes"])] = np.column_stack([found["boxes"], found["labels"], found["scores"]])
        told = np.sort(told, axis=1)
        return {"boxes": told[..., :5], "scores": told[..., 5]}


@dataclass(frozen=True, kw_only=True)
class DataTask(Task):
    """A batch from encoded photographs, each side in a process on one core; the last one is the device's part."""

    SIDES: ClassVar = dict.fromkeys(("timm", "host", "device-worker", "device-augment"), "pipeline")

    def samples(self) -> list[dict[str, Any]]:
        """JPEG files of 500 × 375 pixels, about ImageNet's average: parts of the two photographs of scikit-learn."""
        from PIL import Image
        from sklearn.datasets import load_sample_images

        rng = np.random.default_rng(0)
        sources = [Image.fromarray(pixels) for pixels in load_sample_images().images]
        samples = []
        for number in range(self.batch_size):
            source = sources[number % len(sources)]
            width = int(rng.integers(450, 560))
            height = width * 3 // 4
            left, top = (int(rng.integers(0, most + 1)) for most in (source.width - width, source.height - height))
            part = source.resize((500, 375), Image.Resampling.LANCZOS, (left, top, left + width, top + height))
            file = io.BytesIO()
            part.save(file, "JPEG", quality=int(rng.integers(90, 96)))
            samples.append({"image": file.getvalue(), "label": number, "name": f"photograph {number}"})
        return samples

    def recipe(self, augment_on: str) -> TrainConfig:
        """The paper's: crop, flip, RandAugment, erasing."""
        return dataclasses.replace(RECIPES["imagenet"], augment_on=augment_on)


@dataclass(frozen=True, kw_only=True)
class Form:
    """One of the forms in which a trained model is shipped."""

    runs_in: Literal["torch", "onnxruntime", "stablehlo", "qwix"]
    file: str  # that its process loads
    bytes: int  # of weights and program; of qwix, whose integers are made when it starts, in memory
    dtype: Literal["float32", "float16", "int8"]  # of its weights
    qat: bool = False  # whether its weights are those of the quantisation-aware training


@dataclass(frozen=True, kw_only=True)
class DeployTask(Task):
    """The forms of one model, each a side, and images that have been read already."""

    about: dict[str, Any]  # what a result says of model and data
    forms: dict[str, Form]
    images: str  # a .npy file of (images, height, width, 3), float32, normalised
    checked: int  # so many of them, from the first, are classified before anything is timed

    def loader(self, side: str) -> str:
        return "benchmarks.sides.deployed:load"

    def told(self) -> dict[str, Any]:
        return self.about | super().told()

    def batches(self) -> Iterator[Images]:
        """The checked images; the last batch is filled up with its own, so that nothing is compiled for it alone."""
        images = np.load(self.images, mmap_mode="r")[: self.checked]
        for start in range(0, self.checked, self.batch_size):
            batch = images[start : start + self.batch_size]
            yield np.resize(batch, (self.batch_size, *batch.shape[1:]))
