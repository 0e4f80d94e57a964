"""What travels between the readers, the changes and the writers."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from crossvit_jax.config import CrossViTConfig, DenseConfig
from crossvit_jax.preprocess import Exif


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The weights of one CrossViT, or of a detector or segmenter on one, whatever file they came from."""

    config: CrossViTConfig | DenseConfig
    tensors: Mapping[str, np.ndarray]  # timm's names and layouts, each in its stored dtype
    class_names: tuple[str, ...] | None = None
    exif: Exif | None = None  # whether training turned images as EXIF says, where the source tells
    patch_sizes: tuple[tuple[int, ...], ...] | None = None  # that training drew from, where there were several
    entropies: tuple[float, ...] | None = None  # of grey levels in bits, that part the training pictures among these
    origin: str | None = None  # where they come from, in words; .safetensors files keep it
    trained: Mapping[str, Any] | None = None  # how, for people: settings and data of the run that they come from
    curves: Path | None = None  # the picture of that run's curves
    license: str = "Apache-2.0"  # that of the published weights; exported files tell it
    notes: tuple[str, ...] = ()  # what was chosen and changed on the way, for the user to read

    @property
    def dtypes(self) -> list[str]:
        """The names of the dtypes in use, the commonest first."""
        names = [array.dtype.name for array in self.tensors.values()]
        return sorted(set(names), key=names.count, reverse=True)

    def astype(self, dtype: np.dtype) -> "Weights":
        """The same weights, rounded to `dtype`; too large ones become infinite, see `non_finite`."""
        with np.errstate(over="ignore"):
            tensors = {name: array.astype(dtype, copy=False) for name, array in self.tensors.items()}
        return dataclasses.replace(self, tensors=tensors)

    def non_finite(self) -> str | None:
        """A sentence that counts the NaN and infinite weights, or None where there are none."""
        bad = {name: array.size - int(np.isfinite(array).sum()) for name, array in self.tensors.items()}
        bad = {name: count for name, count in bad.items() if count}
        if not bad:
            return None
        total = sum(array.size for array in self.tensors.values())
        named = ", ".join(f"{name} ({count:,})" for name, count in list(bad.items())[:8])
        more = f" and {len(bad) - 8} more tensors" if len(bad) > 8 else ""
        return f"{sum(bad.values()):,} of {total:,} weights are NaN or infinite: {named}{more}"
