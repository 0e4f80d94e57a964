"""CrossViT (arXiv 2103.14899) in PyTorch, the twin of `crossvit_jax`, module for module."""

import importlib.util

if importlib.util.find_spec("torch") is None:
    raise ModuleNotFoundError("crossvit_torch needs torch: pip install -e '.[torch]' in a clone", name="torch")

from crossvit_jax.config import Branch, CrossViTConfig, DetectorConfig, SegmenterConfig, get_config, list_variants
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
