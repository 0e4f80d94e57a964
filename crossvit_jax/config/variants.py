"""The one table of variants."""

import difflib
from fractions import Fraction

from crossvit_jax.config.branch import Branch
from crossvit_jax.config.crossvit import CrossViTConfig


def _variant(name, embed_dim, depth, num_heads, mlp_ratio, scale=Fraction(14, 15), **settings) -> CrossViTConfig:
    """A row of the paper's tables 1 and 2: `depth` is that of the large-patch branch, the other has one block."""
    both = {"num_heads": num_heads, "mlp_ratio": mlp_ratio}
    small = Branch(embed_dim=embed_dim, depth=1, patch_size=12, **both)
    large = Branch(embed_dim=2 * embed_dim, depth=depth, patch_size=16, image_scale=scale, **both)
    return CrossViTConfig(name=name, branches=(small, large), **settings)


_AT_408 = {"image_size": 408, "scale": Fraction(16, 17), "crop_pct": 1.0}

# timm's name -> settings. IBM's names end in _224 and _384 for timm's _240 and _408.
_TABLE = {
    "crossvit_tiny_240": _variant("ti", 96, 4, 3, 4.0),
    "crossvit_small_240": _variant("s", 192, 4, 6, 4.0),
    "crossvit_base_240": _variant("b", 384, 4, 12, 4.0),
    "crossvit_9_240": _variant("9", 128, 3, 4, 3.0),
    "crossvit_15_240": _variant("15", 192, 5, 6, 3.0),
    "crossvit_18_240": _variant("18", 224, 6, 7, 3.0),
    "crossvit_9_dagger_240": _variant("9-dagger", 128, 3, 4, 3.0, multi_conv=True),
    "crossvit_15_dagger_240": _variant("15-dagger", 192, 5, 6, 3.0, multi_conv=True),
    "crossvit_18_dagger_240": _variant("18-dagger", 224, 6, 7, 3.0, multi_conv=True),
    "crossvit_15_dagger_408": _variant("15-dagger-408", 192, 5, 6, 3.0, multi_conv=True, **_AT_408),
    "crossvit_18_dagger_408": _variant("18-dagger-408", 224, 6, 7, 3.0, multi_conv=True, **_AT_408),
}
CUSTOM = "custom"  # the name of a model with branches of one's own
VARIANTS: dict[str, CrossViTConfig] = {config.name: config for config in _TABLE.values()}
TIMM_NAMES: dict[str, str] = {config.name: timm_name for timm_name, config in _TABLE.items()}
IBM_NAMES = {short: name.replace("_240", "_224").replace("_408", "_384") for short, name in TIMM_NAMES.items()}
_SHORT_NAMES = {name: short for names in (TIMM_NAMES, IBM_NAMES) for short, name in names.items()}
_SHORT_NAMES |= {short: short for short in VARIANTS}


def list_variants() -> list[str]:
    """The short names of the 11 published variants, in the order of the paper's tables."""
    return list(VARIANTS)


def get_config(name: str, **overrides) -> CrossViTConfig:
    """The settings of a variant, with some replaced.

    Args:
        name: short (`ti`), timm's (`crossvit_tiny_240`, `crossvit_tiny_240.in1k`) or IBM's (`crossvit_tiny_224`).
        **overrides: fields of `CrossViTConfig`, or settings of its branches, see `CrossViTConfig.replace`.

    Raises:
        ValueError: the name is unknown (the message lists the known ones and the nearest), or a value is refused.
        TypeError: an override is no setting.
    """
    short = _SHORT_NAMES.get(name.split(".")[0])
    if short is None:
        near = difflib.get_close_matches(name, _SHORT_NAMES, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"unknown CrossViT variant {name!r}; did you mean {near!r}? Known: {', '.join(VARIANTS)}, "
            f"and timm's and IBM's names for them (such as {TIMM_NAMES['ti']}, {IBM_NAMES['ti']})"
        )
    if "pretrained" in overrides:
        raise TypeError(
            f"fresh weights only: convert.load_flax({short!r}, pretrained=True) or load_torch loads trained ones"
        )
    return VARIANTS[short].replace(**overrides)
