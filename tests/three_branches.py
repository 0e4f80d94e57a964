"""A small model of three branches: its text for the command line, and weights of it that all matter."""

import numpy as np

from convert import save
from convert.architecture import expected_shapes
from crossvit_jax.config import CUSTOM, Branch, CrossViTConfig

TEXTS = (
    "embed_dim=12,depth=1,num_heads=2,mlp_ratio=2,patch_size=12,image_scale=1",
    "embed_dim=24,depth=1,num_heads=3,mlp_ratio=2,patch_size=16,image_scale=2/3",
    "embed_dim=16,depth=1,num_heads=2,mlp_ratio=2,patch_size=8,image_scale=1/2",
)
BRANCHES = tuple(map(Branch.parse, TEXTS))


def three_config(num_classes: int, **settings) -> CrossViTConfig:
    settings = {"stages": 1, "image_size": 48, "crop_pct": 1.0} | settings
    return CrossViTConfig(name=CUSTOM, branches=BRANCHES, num_classes=num_classes, **settings)


def save_three(path, class_names, **settings):
    """The path, where weights of the model now are."""
    config, rng = three_config(len(class_names)).replace(**settings), np.random.default_rng(0)
    weights = {
        name: rng.normal(len(shape) == 1 and name.endswith("weight"), 0.1, shape).astype(np.float32)
        for name, shape in expected_shapes(config).items()
    }
    return save(weights, config, path, class_names=None if path.suffix == ".pth" else tuple(class_names))
