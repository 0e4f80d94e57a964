"""CrossViT (arXiv 2103.14899) in PyTorch, the twin of `crossvit_jax`, module for module."""

import importlib.util

from crossvit_jax.extras import needs

if importlib.util.find_spec("torch") is None:
    raise ModuleNotFoundError(needs("crossvit_torch", ["torch"], "torch"), name="torch")

from crossvit_jax.config import Branch, CrossViTConfig, get_config, list_variants
from crossvit_jax.dense_config import DetectorConfig, SegmenterConfig
from crossvit_torch.crossvit import CrossViT, create_model
from crossvit_torch.detection import CrossViTDetector, create_detector
from crossvit_torch.segmentation import CrossViTSegmenter, create_segmenter

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
]
