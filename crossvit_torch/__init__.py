"""CrossViT (arXiv 2103.14899) in PyTorch, the twin of `crossvit_jax`, module for module."""

from crossvit_jax.config import Branch, CrossViTConfig, get_config, list_variants
from crossvit_torch.crossvit import CrossViT, create_model

__all__ = ["Branch", "CrossViT", "CrossViTConfig", "create_model", "get_config", "list_variants"]
