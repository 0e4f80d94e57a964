"""What the sides of the data benchmark are asked to do: make a training batch of photographs. Imports no framework."""

import dataclasses
import functools
import io
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.task import Program
from train.config import TrainConfig
from train.recipes import RECIPES

SIDES = ("timm", "host", "device-worker", "device-augment")
SIDES_ON_A_CORE = SIDES[:3]  # the last one is the device's own part, on as many cores as XLA takes
SIZE = 240


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
            left, top = (int(rng.integers(0, room + 1)) for room in (source.width - width, source.height - height))
            part = source.resize((500, 375), Image.Resampling.LANCZOS, (left, top, left + width, top + height))
            file = io.BytesIO()
            part.save(file, "JPEG", quality=int(rng.integers(90, 96)))
            samples.append({"image": file.getvalue(), "label": number, "name": f"photograph {number}"})
        return samples

    def recipe(self, augment_on: str) -> TrainConfig:
        """The paper's: crop, flip, RandAugment, erasing."""
        return dataclasses.replace(RECIPES["imagenet"], augment_on=augment_on)

    def load(self, side: str) -> Program:
        """The program of a side."""
        from benchmarks.sides import pipeline as data_sides

        programs = {
            "timm": data_sides.timm,
            "host": functools.partial(data_sides.ours, augment_on="host"),
            "device-worker": functools.partial(data_sides.ours, augment_on="device"),
            "device-augment": data_sides.device_augment,
        }
        return programs[side](self)
