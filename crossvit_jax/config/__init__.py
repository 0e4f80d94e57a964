"""The settings of models: branches, the table of variants, detectors and segmenters. No framework."""

from crossvit_jax.config.branch import (
    BRANCH_SETTINGS,
    EXAMPLE,
    Branch,
    mlp_ratio,
    read_fraction,
    shown_value,
    sr_ratio_of,
)
from crossvit_jax.config.crossvit import CrossViTConfig
from crossvit_jax.config.dense import (
    CONFIGS,
    DenseConfig,
    DetectorConfig,
    SegmenterConfig,
    build_dense_config,
    get_dense_config,
)
from crossvit_jax.config.masking import cell_overlaps
from crossvit_jax.config.reduction import REDUCTIONS, Reduction, for_each_branch
from crossvit_jax.config.variants import CUSTOM, IBM_NAMES, TIMM_NAMES, VARIANTS, get_config, list_variants

__all__ = [
    "BRANCH_SETTINGS",
    "CONFIGS",
    "CUSTOM",
    "EXAMPLE",
    "IBM_NAMES",
    "REDUCTIONS",
    "TIMM_NAMES",
    "VARIANTS",
    "Branch",
    "CrossViTConfig",
    "DenseConfig",
    "DetectorConfig",
    "Reduction",
    "SegmenterConfig",
    "build_dense_config",
    "cell_overlaps",
    "for_each_branch",
    "get_config",
    "get_dense_config",
    "list_variants",
    "mlp_ratio",
    "read_fraction",
    "shown_value",
    "sr_ratio_of",
]
