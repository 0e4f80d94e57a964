"""CrossViT (arXiv 2103.14899) in Flax NNX. Importing the package, its config or `preprocess_image` imports no jax."""

import importlib

from crossvit_jax.config import Branch, CrossViTConfig, DetectorConfig, SegmenterConfig, get_config, list_variants

__version__ = "0.1.0"
__all__ = [
    "Branch",
    "CrossViT",
    "CrossViTConfig",
    "CrossViTDetector",
    "CrossViTSegmenter",
    "DetectorConfig",
    "SegmenterConfig",
    "create_detector",
    "create_model",
    "create_segmenter",
    "get_config",
    "list_variants",
    "preprocess_image",
]

_LATE = {"CrossViT": "crossvit", "create_model": "crossvit", "preprocess_image": "preprocess"}
_LATE |= {"CrossViTDetector": "detection", "create_detector": "detection"}
_LATE |= {"CrossViTSegmenter": "segmentation", "create_segmenter": "segmentation"}


def __getattr__(name: str):
    if name in _LATE:
        return getattr(importlib.import_module(f"crossvit_jax.{_LATE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})  # what is imported late is completed too
