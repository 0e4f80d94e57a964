"""CrossViT (arXiv 2103.14899) in Flax NNX. Importing the package, its config or `preprocess_image` imports no jax."""

import importlib

from crossvit_jax.config import Branch, CrossViTConfig, get_config, list_variants

__all__ = ["Branch", "CrossViT", "CrossViTConfig", "create_model", "get_config", "list_variants", "preprocess_image"]

_LATE = {"CrossViT": "crossvit", "create_model": "crossvit", "preprocess_image": "preprocess"}


def __getattr__(name: str):
    if name in _LATE:
        return getattr(importlib.import_module(f"crossvit_jax.{_LATE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
