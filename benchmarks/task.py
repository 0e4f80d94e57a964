"""What the sides of each benchmark are asked to run, as plain data, and what they offer to be timed.

The process of a side gets its task and loads its program by name (`loader`). Imports no framework and no side.
"""

import dataclasses
import io
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from jaxtyping import Float32

from convert.files import FOLDER_PREFIX
from crossvit_jax.config import DetectorConfig, get_config, get_dense_config
from train.config import TrainConfig
from train.recipes import RECIPES

# XLA's attention or cuDNN's; eager, torch.compile, and that with images and kernels channels last
SIDES = ("flax", "flax-cudnn", "timm", "timm-compile", "timm-channels-last")
_GPU_WARM_UP_S = 1.0  # see `Program.warm_up_s`
CHECKED_STEPS = 2  # the loss of the second one also tells whether gradient and update were right
_DIFFERENT_IMAGES = 256  # in larger batches they come again: drawing thousands takes longer than the search

DETECTION_SIDES = ("torchvision", "torchvision-compile", "flax")
DETECTION_CLASSES, _BOXES = 80, 8  # COCO's classes; in each image

DATA_SIDES = ("timm", "host", "device-worker", "device-augment")
SIDES_ON_A_CORE = DATA_SIDES[:3]  # the last one is the device's own part, on as many cores as XLA takes
SIZE = 240  # of the images that the data benchmark makes

FLAX_STEPS, TIMM_STEPS = ("flax", "flax-cudnn"), ("timm", "timm-compile")  # of `SIDES`, that can be fed from files
FLAX_FED, TIMM_FED = {"flax-device": "device", "flax-host": "host"}, "timm-loader"  # ours by where they augment
PHOTOGRAPH_CLASSES = 10  # of the files; the model has its thousand
_STEPS, _STEPS_PER_WORKER = 8, 4  # of a step that is fed, in a call, at least

Images = Float32[np.ndarray, "batch height width 3"]


def default_sides(device: str, dtype: str) -> list[str]:
    """All that the device can run; on a CPU without channels last, which is meant for the convolutions of GPUs.

    cuDNN's attention is for half precision only.
    """
    if device == "cpu":
        return ["flax", "timm", "timm-compile"]
    return [side for side in SIDES if side != "flax-cudnn" or dtype == "bfloat16"]


def usable_cores() -> int:
    """Those that this process may use; XLA has a thread for each."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def jax_facts() -> dict[str, str]:
    """Version, threads and device of a side that computes with jax."""
    import jax

    return {"jax": jax.__version__, "jax threads": str(usable_cores()), "jax device": jax.devices()[0].device_kind}


class Loadable(Protocol):
    """A task: plain data that every side of a benchmark gets alike."""

    def loader(self, side: str) -> str:
        """The name of the function that makes the side's program, such as "benchmarks.sides.timm:load".

        It takes the task and the side's name, and is in the module that imports the side's framework.
        """


@dataclass(frozen=True)
class Program:
    """A task, loaded and ready on one side."""

    # What the sides must agree on: pixels, or of models a dict of arrays. These are `logits`; or, of unmixed training
    # steps, `losses`, and of each parameter the norm of what AdamW makes of its `gradients` (the first moment).
    check: Callable[[], Any]
    run: Callable[[int], None]  # that many calls; returns when the results are there
    facts: dict[str, str]  # versions, threads, device
    around: Callable[[], AbstractContextManager] = nullcontext  # what surrounds a round and is not timed
    close: Callable[[], None] = lambda: None  # ends the processes that it started
    rest: Callable[[], None] = lambda: None  # between its turns: leaves unused device memory, and cores, to others
    warm_up_s: float = 3.0  # on a CPU; by then a process has the memory that it needs
    peak_bytes: Callable[[], int | None] = lambda: None  # the most device memory in use so far; None on a CPU
    flops: Callable[[], int] | None = None  # of the model in a call: see `flops_per_image`
    peak_flops: Callable[[], float] | None = None  # measures the device's, see `benchmarks.sides.model_flops`
    float32: Callable[[], Any] | None = None  # for a task in bfloat16: what `check` would give in float32


def repeated(call: Callable[[], Any], wait: Callable[[Any], Any] = lambda result: None) -> Callable[[int], None]:
    """The `run` of a program whose calls are all alike; the last result is waited for."""

    def run(calls: int) -> None:
        for _ in range(calls):
            result = call()
        wait(result)

    return run


def on_gpu(program: Program, **changes: Any) -> Program:
    """A program as a GPU wants it, which is warm sooner: a call before each round takes again what `rest` gave back."""

    @contextmanager
    def around() -> Iterator[None]:
        program.run(1)
        yield

    return dataclasses.replace(program, around=around, warm_up_s=_GPU_WARM_UP_S, **changes)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One model, batch and precision; every side gets the same."""

    benchmark: str  # inference or training
    variant: str
    batch_size: int
    dtype: str  # float32 or bfloat16
    device: str  # cpu or gpu
    weights: str  # a safetensors file with timm's names

    def loader(self, side: str) -> str:
        """See `Loadable`."""
        return f"benchmarks.sides.{'flax' if side.startswith('flax') else 'timm'}:load"

    def images(self) -> np.ndarray:
        """(batch, height, width, 3), float32: the same numbers in every process."""
        shape = (min(self.batch_size, _DIFFERENT_IMAGES), *get_config(self.variant).image_size, 3)
        different = np.random.default_rng(0).standard_normal(shape, np.float32)
        return np.resize(different, (self.batch_size, *shape[1:]))  # repeats them

    def labels(self) -> np.ndarray:
        """(batch,), int32."""
        return np.random.default_rng(1).integers(1000, size=self.batch_size, dtype=np.int32)

    def recipe(self) -> TrainConfig:
        """The paper's loss, mixing and decay, at a small constant learning rate: random images teach nothing.

        Odd batches are not mixed: timm mixes images in pairs.
        """
        mixing = {"mixup": 0.0, "cutmix": 0.0} if self.batch_size % 2 else {}
        return dataclasses.replace(
            RECIPES["imagenet"],
            **mixing,
            batch_size=self.batch_size,
            lr_batch_size=self.batch_size,
            lr=1e-4,
            warmup_epochs=0,
            drop_path=0.0,
        )


@dataclass(frozen=True, kw_only=True)
class DetectionTask:
    """A detector and a batch, from images to boxes or a training step, on a CPU; every side gets the same."""

    benchmark: str  # inference or training
    variant: str
    batch_size: int
    weights: str  # a safetensors file of our detector
    dtype: str = "float32"
    device: str = "cpu"

    def loader(self, side: str) -> str:
        """See `Loadable`."""
        return f"benchmarks.sides.{'flax' if side == 'flax' else 'torchvision'}_detection:load"

    def config(self) -> DetectorConfig:
        return get_dense_config("detection", self.variant, num_classes=DETECTION_CLASSES)

    def images(self) -> Images:
        """The same numbers in every process."""
        shape = (self.batch_size, *self.config().image_size, 3)
        return np.random.default_rng(0).standard_normal(shape, np.float32)

    def targets(self) -> dict[str, np.ndarray]:
        """Boxes of each image from large to small, whose areas torchvision tells apart in float32."""
        height, width = self.config().image_size
        rng, shape = np.random.default_rng(1), (self.batch_size, _BOXES)
        shares = np.geomspace(0.9, 0.1, _BOXES)[:, None] * rng.uniform(0.9, 1, (*shape, 2))
        sides = shares * [width, height]
        first = rng.uniform(size=sides.shape) * ([width, height] - sides)
        return {
            "boxes": np.concatenate([first, first + sides], axis=-1).astype(np.float32),
            "classes": rng.integers(DETECTION_CLASSES, size=shape, dtype=np.int32),
            "present": np.ones(shape, bool),
        }

    def recipe(self) -> TrainConfig:
        """The trainer's settings for data of one's own, at a small constant learning rate, the same in all layers."""
        return dataclasses.replace(
            RECIPES["detection"],
            batch_size=self.batch_size,
            lr_batch_size=self.batch_size,
            lr=1e-4,
            warmup_epochs=0,
            layer_decay=1.0,
            precision="float32",
            clip_grad=None,
            drop_path=0.0,
        )


@dataclass(frozen=True, kw_only=True)
class DataTask:
    """A batch from encoded photographs; every side gets the same."""

    photographs: int = 48

    def samples(self) -> list[dict[str, Any]]:
        """JPEG files of 500 × 375 pixels, about ImageNet's average: parts of the two photographs of scikit-learn."""
        from PIL import Image
        from sklearn.datasets import load_sample_images

        rng = np.random.default_rng(0)
        sources = [Image.fromarray(pixels) for pixels in load_sample_images().images]
        samples = []
        for number in range(self.photographs):
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

    def loader(self, side: str) -> str:
        """See `Loadable`."""
        return "benchmarks.sides.pipeline:load"


@dataclass(frozen=True, kw_only=True)
class EndToEndTask:
    """A training step that is fed from JPEG files; every side gets the same."""

    step: Task  # as the training benchmark has it
    flax: str = "flax"  # the sides of the training benchmark whose steps are fed
    timm: str = "timm"
    folder: str  # of the photographs, see `write_photographs`
    workers: int  # processes that read and augment

    @property
    def steps(self) -> int:
        """In a call: several batches of each worker, for they come in bursts."""
        return max(_STEPS, _STEPS_PER_WORKER * self.workers)

    @property
    def image_size(self) -> tuple[int, int]:
        return get_config(self.step.variant).image_size

    def recipe(self, augment_on: str) -> TrainConfig:
        """The settings of the trainer."""
        return dataclasses.replace(
            self.step.recipe(),
            variant=self.step.variant,
            dataset=FOLDER_PREFIX + self.folder,
            workers=self.workers,
            augment_on=augment_on,
        )

    def loader(self, side: str) -> str:
        """See `Loadable`; calls are of `steps` steps."""
        if side == TIMM_FED:
            return "benchmarks.sides.fed_timm:load"
        return f"benchmarks.sides.{'fed_flax:load' if side in FLAX_FED else 'fed:load_step_alone'}"


@dataclass(frozen=True, kw_only=True)
class Form:
    """One of the forms in which a trained model is shipped."""

    runs_in: Literal["torch", "onnxruntime", "stablehlo", "qwix"]
    file: str  # that its process loads
    size: int  # bytes, of weights and program; of qwix, whose integers are made when it starts, in memory
    dtype: Literal["float32", "float16", "int8"]  # of its weights
    qat: bool = False  # whether its weights are those of the quantisation-aware training


@dataclass(frozen=True, kw_only=True)
class DeployTask:
    """The forms of one model, and images that have been read already; every side gets the same."""

    forms: dict[str, Form]  # by the names of their sides
    images: str  # a .npy file of (images, height, width, 3), float32, normalised
    checked: int  # so many of them, from the first, are classified before anything is timed
    batch_size: int

    def loader(self, side: str) -> str:
        """See `Loadable`."""
        return "benchmarks.sides.deployed:load"

    def batches(self) -> Iterator[Images]:
        """The checked images; the last batch is filled up with its own, so that nothing is compiled for it alone."""
        images = np.load(self.images, mmap_mode="r")[: self.checked]
        for start in range(0, self.checked, self.batch_size):
            batch = images[start : start + self.batch_size]
            yield np.resize(batch, (self.batch_size, *batch.shape[1:]))
