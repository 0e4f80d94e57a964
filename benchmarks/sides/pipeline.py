"""The sides of the data benchmark: timm's transform, ours in a worker in both of its forms, and the device's part.

Each call makes one batch. What `check` gives is by name; sides that give the same name must agree to the bit.
"""

import importlib.metadata
import io
import itertools
import random

import numpy as np

from benchmarks.task import SIZE, DataTask, Program, jax_facts, repeated


def load(task: DataTask, side: str) -> Program:
    """The program of a side."""
    if side == "timm":
        return _timm(task)
    if side == "device-augment":
        return _device_augment(task)
    return _worker(task, augment_on="device" if side == "device-worker" else "host")


def _timm(task: DataTask) -> Program:
    """timm's training transform as a worker of torch's DataLoader runs it: one thread, tensors stacked to a batch."""
    import torch
    from PIL import Image
    from timm.data import create_transform
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resized_crop

    from train.images.transforms import draw_crop, timm_settings

    torch.set_num_threads(1)
    config, samples = task.recipe("host"), task.samples()
    transform = create_transform(SIZE, **timm_settings(config))

    def opened(sample) -> Image.Image:
        return Image.open(io.BytesIO(sample["image"])).convert("RGB")

    def check() -> dict[str, np.ndarray]:
        images, crops = [], []
        for number, sample in enumerate(samples):
            python, numpy, torchs = (int(seed) for seed in np.random.default_rng(number).integers(0, 2**32, size=3))
            random.seed(python)
            np.random.seed(numpy)
            torch.manual_seed(torchs)
            images.append(transform(opened(sample)).permute(1, 2, 0).numpy())
            image = opened(sample)
            rng = np.random.default_rng(number)
            box = draw_crop(rng, (image.height, image.width), config.crop_scale, config.crop_ratio)
            crops.append(np.asarray(resized_crop(image, *box, (SIZE, SIZE), InterpolationMode.BICUBIC)))
        return {"images": np.stack(images), "crops": np.stack(crops)}

    def call() -> torch.Tensor:
        return torch.stack([transform(opened(sample)) for sample in samples])

    return Program(check, repeated(call), _versions("timm", "torch", "pillow"))


def _worker(task: DataTask, *, augment_on: str) -> Program:
    """What a worker of ours does to a batch."""
    from train.images.transforms import train_transform

    config, samples = task.recipe(augment_on), task.samples()
    transform = train_transform(config, config.model_config(1000))
    rng = np.random.default_rng(0)

    def check() -> dict[str, np.ndarray]:
        images = [transform(sample, np.random.default_rng(number))["image"] for number, sample in enumerate(samples)]
        return {"images" if augment_on == "host" else "crops": np.stack(images)}

    def call() -> np.ndarray:
        return np.stack([transform(sample, rng)["image"] for sample in samples])

    return Program(check, repeated(call), _versions("pillow", "numba", "simplejpeg"))


def _device_augment(task: DataTask) -> Program:
    """What is left to the device, of a batch that lies there."""
    import jax

    from train.devices.mesh import batch_sharding, make_mesh
    from train.images.augment import compile_augment
    from train.images.transforms import train_transform

    config, mesh = task.recipe("device"), make_mesh(devices=jax.devices()[:1])
    transform = train_transform(config, config.model_config(1000))
    samples = task.samples()
    crops = np.stack([transform(sample, np.random.default_rng(0))["image"] for sample in samples])
    batch = jax.device_put(crops, batch_sharding(mesh))
    augment, steps = compile_augment(batch.shape, config, mesh), itertools.count()
    run = repeated(lambda: augment(batch, next(steps)), jax.block_until_ready)
    return Program(dict, run, jax_facts())  # the operations are compared with timm's in tests/train


def _versions(*packages: str) -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in packages}
