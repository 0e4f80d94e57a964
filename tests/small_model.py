"""The variant `ti` shrunk until it compiles in seconds. Imports no framework."""

from collections.abc import Callable
from typing import Any

from crossvit_jax.config import CUSTOM, VARIANTS, CrossViTConfig


def shrink(set_item: Callable[[dict, str, CrossViTConfig], Any]) -> None:
    """Sets the shrunk variant in the table of variants by `set_item(table, name, config)`."""
    config = VARIANTS["ti"].replace(embed_dim=(12, 24), depth=(1, 1), num_heads=(2, 2), mlp_ratio=(2.0, 2.0), stages=1)
    set_item(VARIANTS, "ti", config)


def small_config(classes: int) -> CrossViTConfig:
    """The settings of the shrunk variant at 48 pixels, all of which are seen, under a name of their own."""
    table: dict[str, CrossViTConfig] = {}
    shrink(lambda _, name, config: table.update({name: config}))
    return table["ti"].replace(name=CUSTOM, image_size=48, image_scale=(1.0, 2 / 3), crop_pct=1.0, num_classes=classes)
