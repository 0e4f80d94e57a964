"""What the sides of the deployment benchmark are asked to do: run a shipped form of a model. Imports no framework."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float32

from benchmarks.task import Program

Images = Float32[np.ndarray, "batch height width 3"]


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

    def load(self, side: str) -> Program:
        """The program of a side. Imports its framework."""
        from benchmarks.sides import deployed as deploy_sides

        form = self.forms[side]
        return deploy_sides.LOADERS[form.runs_in](self, form.file)

    def batches(self) -> Iterator[Images]:
        """The checked images; the last batch is filled up with its own, so that nothing is compiled for it alone."""
        images = np.load(self.images, mmap_mode="r")[: self.checked]
        for start in range(0, self.checked, self.batch_size):
            batch = images[start : start + self.batch_size]
            yield np.resize(batch, (self.batch_size, *batch.shape[1:]))
