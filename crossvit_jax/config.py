"""The one table of variants, and the settings of a model. Imports no framework."""

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, kw_only=True)
class CrossViTConfig:
    """Everything that defines a CrossViT. Pairs are (branch 0: small patches, branch 1: large patches).

    Raises ValueError for settings that make no model, naming the value and what is accepted.
    """

    name: str  # the variant's short name
    embed_dim: tuple[int, int]
    depth: tuple[int, int]  # transformer blocks of each branch, per stage
    num_heads: tuple[int, int]
    mlp_ratio: tuple[float, float]
    multi_conv: bool = False  # three convolutions embed the patches (the dagger variants) instead of one
    stages: int = 3
    patch_size: tuple[int, int] = (12, 16)
    image_size: int | tuple[int, int] = (240, 240)  # height, width; an int is a square, and becomes a pair
    image_scale: tuple[float | Fraction, float | Fraction] = (Fraction(1), Fraction(14, 15))  # become Fractions
    in_chans: int = 3
    num_classes: int = 1000  # 0: no head, the model returns the pooled features of both branches
    global_pool: str = "token"
    crop_scale: bool = False  # a branch with a smaller image crops it instead of resizing
    crop_pct: float = 0.875  # share of the resized image that evaluation keeps
    qkv_bias: bool = True
    drop_rate: float = 0.0  # before the head
    pos_drop_rate: float = 0.0  # after the position embeddings
    proj_drop_rate: float = 0.0  # after the projections of attention and inside the MLP
    attn_drop_rate: float = 0.0  # on the attention weights
    drop_path_rate: float = 0.0  # stochastic depth of the last block; earlier blocks get linearly less

    def __post_init__(self):
        def set_field(name, value):
            object.__setattr__(self, name, value)

        size = self.image_size
        set_field("image_size", (size, size) if isinstance(size, int) else tuple(size))
        # each branch sees image_size times its scale; timm writes a float (224/240), a fraction makes every size exact
        set_field("image_scale", tuple(Fraction(scale).limit_denominator(1024) for scale in self.image_scale))
        if len(self.image_size) != 2 or any(not isinstance(side, int) or side < 1 for side in self.image_size):
            raise ValueError(f"image_size must be an int or (height, width), all positive; got {size!r}")
        for field in ("in_chans", "stages"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1; got {getattr(self, field)}")
        if self.num_classes < 0:
            raise ValueError(f"num_classes must be 0 (no head) or more; got {self.num_classes}")
        if self.global_pool not in ("token", "avg"):
            raise ValueError(f"global_pool must be 'token' or 'avg'; got {self.global_pool!r}")
        for field in ("drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"):
            if not 0.0 <= getattr(self, field) < 1.0:
                raise ValueError(f"{field} must be in [0, 1); got {getattr(self, field)}")
        if self.multi_conv and self.patch_size != (12, 16):
            raise ValueError(f"three-convolution patch embedding needs patch_size (12, 16); got {self.patch_size}")
        for axis, side in zip(("height", "width"), self.image_size, strict=True):
            if not self._side_fits(side):
                raise ValueError(self._bad_side(axis, side))

    def _side_fits(self, side: int) -> bool:
        """Whether both branches cut an image side of this many pixels into whole patches."""
        return all((side * s) % p == 0 for s, p in zip(self.image_scale, self.patch_size, strict=True))

    def _bad_side(self, axis: str, side: int) -> str:
        step = next(n for n in range(1, 1 << 20) if self._side_fits(n))  # sizes that fit are its multiples
        below = max(step, side // step * step)
        patches = " and ".join(
            f"{float(side * s):g} pixels in patches of {p}"
            for s, p in zip(self.image_scale, self.patch_size, strict=True)
        )
        return (
            f"image {axis} {side} does not divide into whole patches: the branches would see {patches}; "
            f"the nearest valid sizes are {below} and {below + step} (image_scale "
            f"{self.image_scale[0]}, {self.image_scale[1]})"
        )

    @property
    def branch_image_size(self) -> tuple[tuple[int, int], ...]:
        """(height, width) in pixels of the image that each branch sees."""
        return tuple(tuple(int(side * scale) for side in self.image_size) for scale in self.image_scale)

    @property
    def grid_size(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of patches of each branch."""
        return tuple((h // p, w // p) for (h, w), p in zip(self.branch_image_size, self.patch_size, strict=True))

    @property
    def drop_path_rates(self) -> tuple[tuple[float, ...], ...]:
        """One slice per stage: block i of either branch takes slice[i], both fusions slice[-1] (timm's rule).

        The narrow branch is shallower, so it only ever gets the first rates of each slice.
        """
        per_stage = max(self.depth)
        steps = max(1, self.stages * per_stage - 1)
        return tuple(
            tuple(self.drop_path_rate * (stage * per_stage + block) / steps for block in range(per_stage))
            for stage in range(self.stages)
        )

    @property
    def is_stochastic(self) -> bool:
        """Whether training mode draws random numbers."""
        rates = (self.drop_rate, self.pos_drop_rate, self.proj_drop_rate, self.attn_drop_rate, self.drop_path_rate)
        return any(rate > 0.0 for rate in rates)

    def feature_indices(self, indices: int | Sequence[int] | None = None) -> list[int]:
        """Intermediate features as indices from 0, branch by branch and stage by stage (timm's order, ascending).

        Args:
            indices: None for all, an int n for the last n, or indices, negative ones counted from the end.

        Raises:
            ValueError: out of range, or none.
        """
        total = len(self.embed_dim) * self.stages
        wanted = range(-indices, 0) if isinstance(indices, int) else range(total) if indices is None else indices
        if not wanted or any(not -total <= index < total for index in wanted):
            raise ValueError(f"feature indices must be from {-total} to {total - 1}, at least one; got {indices!r}")
        return sorted({index % total for index in wanted})


def _variant(name, embed_dim, depth, num_heads, mlp_ratio, **settings) -> CrossViTConfig:
    """A row of the paper's tables 1 and 2: `depth` is that of the large-patch branch, the other has one block."""
    return CrossViTConfig(
        name=name,
        embed_dim=(embed_dim, 2 * embed_dim),
        depth=(1, depth),
        num_heads=(num_heads, num_heads),
        mlp_ratio=(mlp_ratio, mlp_ratio),
        **settings,
    )


_AT_408 = {"image_size": 408, "image_scale": (Fraction(1), Fraction(16, 17)), "crop_pct": 1.0}

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
VARIANTS: dict[str, CrossViTConfig] = {config.name: config for config in _TABLE.values()}
TIMM_NAMES: dict[str, str] = {config.name: timm_name for timm_name, config in _TABLE.items()}
IBM_NAMES: dict[str, str] = {
    short: timm_name.replace("_240", "_224").replace("_408", "_384") for short, timm_name in TIMM_NAMES.items()
}
_SHORT_NAMES = {name: short for names in (TIMM_NAMES, IBM_NAMES) for short, name in names.items()}
_SHORT_NAMES |= {short: short for short in VARIANTS}


def list_variants() -> list[str]:
    """The short names of the 11 published variants, in the order of the paper's tables."""
    return list(VARIANTS)


def get_config(name: str, **overrides) -> CrossViTConfig:
    """The settings of a variant, with some replaced.

    Args:
        name: short (`ti`), timm's (`crossvit_tiny_240`, `crossvit_tiny_240.in1k`) or IBM's (`crossvit_tiny_224`).
        **overrides: fields of `CrossViTConfig`.

    Raises:
        ValueError: the name is unknown (the message lists the known ones and the nearest), or a value is refused.
        TypeError: an override is no field of `CrossViTConfig`.
    """
    short = _SHORT_NAMES.get(name.split(".")[0])
    if short is None:
        near = difflib.get_close_matches(name, _SHORT_NAMES, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"unknown CrossViT variant {name!r}; did you mean {near!r}? Known: {', '.join(VARIANTS)}, "
            f"and timm's and IBM's names for them (such as {TIMM_NAMES['ti']}, {IBM_NAMES['ti']})"
        )
    fields = [field.name for field in dataclasses.fields(CrossViTConfig) if field.name != "name"]
    unknown = [key for key in overrides if key not in fields]
    if unknown:
        raise TypeError(f"unknown setting {', '.join(map(repr, unknown))}; accepted: {', '.join(fields)}")
    return dataclasses.replace(VARIANTS[short], **overrides)
