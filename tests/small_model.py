"""The variant `ti` shrunk until it compiles in seconds. Imports no framework."""

from collections.abc import Callable
from typing import Any

from crossvit_jax.config import CUSTOM, VARIANTS, CrossViTConfig, DetectorConfig, SegmenterConfig, build_dense_config


def shrink(set_item: Callable[[dict, str, CrossViTConfig], Any]) -> None:
    """Sets the shrunk variant in the table of variants by `set_item(table, name, config)`."""
    config = VARIANTS["ti"].replace(embed_dim=(12, 24), depth=(1, 1), num_heads=(2, 2), mlp_ratio=(2.0, 2.0), stages=1)
    set_item(VARIANTS, "ti", config)


def small_config(classes: int) -> CrossViTConfig:
    """The settings of the shrunk variant at 48 pixels, all of which are seen, under a name of their own."""
    table: dict[str, CrossViTConfig] = {}
    shrink(lambda _, name, config: table.update({name: config}))
    return table["ti"].replace(name=CUSTOM, image_size=48, image_scale=(1.0, 2 / 3), crop_pct=1.0, num_classes=classes)


def small_detector(image_size: int | tuple[int, int] = 48, **settings: Any) -> DetectorConfig:
    """The settings of a detector on the shrunk variant, which sees 48 pixels unless told otherwise."""
    backbone = small_config(0).replace(image_size=image_size)
    return build_dense_config("detection", backbone, **{"num_classes": 3, "width": 32, "num_convs": 1} | settings)


def small_segmenter(image_size: int | tuple[int, int] = 48, **settings: Any) -> SegmenterConfig:
    """The settings of a segmenter on the shrunk variant."""
    backbone = small_config(0).replace(image_size=image_size)
    return build_dense_config("segmentation", backbone, **{"num_classes": 4, "width": 64} | settings)
