"""The settings of a CrossViT."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from crossvit_jax.config.branch import (
    BRANCH_SETTINGS,
    DEEPEST,
    LARGEST,
    Branch,
    require_number,
    require_whole,
    shown_value,
)
from crossvit_jax.config.reduction import Reduction
from crossvit_jax.config.settings import Settings

_USUAL = {"head_dim": None, "attention": "full"}  # of branches, see `Branch`
_RATES = ("drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate")
_SMALLEST_CROP = 0.001
_MOST_PIXELS = 2**31 - 1  # what 32 bits count
_MOST_BRANCHES, _MOST_CLASSES, _LONGEST_NAME = 64, 2**24, 64


def _is_list(value: object) -> bool:
    return isinstance(value, tuple | list)


def _of_each_branch(field: str) -> property:
    return property(lambda config: tuple(getattr(branch, field) for branch in config.branches))


@dataclass(frozen=True, kw_only=True)
class CrossViTConfig(Settings):
    """Everything that defines a CrossViT.

    The branches form a ring: the class token of branch i attends over the patches of branch i + 1, that of the last
    branch over those of branch 0. A single branch attends over itself.

    Raises ValueError for settings that make no model, naming the value and what is accepted.
    """

    task: ClassVar[str] = "classification"

    name: str  # the variant's short name, or CUSTOM
    branches: tuple[Branch, ...]
    # Cross-attention blocks that a class token passes in each fusion; a tuple has one number for each stage. 0 is one
    # block too, without a number in its path: the published models. After the first, it sees nothing but itself.
    fusion_depth: int | tuple[int, ...] = 0
    multi_conv: bool = False  # three convolutions embed the patches (the dagger variants) instead of one
    stages: int | None = None  # none: as many as there are numbers in a depth, or 3
    image_size: int | tuple[int, int] = (240, 240)  # height, width; an int is a square, and becomes a pair
    in_chans: int = 3
    num_classes: int = 1000  # 0: no head, the model returns the pooled features of all branches
    global_pool: str = "token"
    crop_scale: bool = False  # a branch with a smaller image crops it instead of resizing
    crop_pct: float = 0.875  # share of the resized image that evaluation keeps
    qkv_bias: bool = True
    drop_rate: float = 0.0  # before the head
    pos_drop_rate: float = 0.0  # after the position embeddings
    proj_drop_rate: float = 0.0  # after the projections of attention and inside the MLP
    attn_drop_rate: float = 0.0  # on the attention weights
    drop_path_rate: float = 0.0  # stochastic depth of the last block; earlier blocks get linearly less
    reduce_tokens: str | None = None  # fewer tokens on the way, see `Reduction`; None or "none": all of them

    embed_dim = _of_each_branch("embed_dim")
    depth = _of_each_branch("depth")
    num_heads = _of_each_branch("num_heads")
    mlp_ratio = _of_each_branch("mlp_ratio")
    patch_size = _of_each_branch("patch_size")
    image_scale = _of_each_branch("image_scale")
    head_dim = _of_each_branch("head_dim")
    attention = _of_each_branch("attention")

    def __post_init__(self):
        size = self.image_size
        self._set("image_size", (size, size) if isinstance(size, int) else tuple(size) if _is_list(size) else ())
        if not _is_list(self.branches) or not all(isinstance(branch, Branch) for branch in self.branches):
            raise ValueError(f"branches must be a tuple of Branch; got {shown_value(self.branches)}")
        if not 0 < len(self.branches) <= _MOST_BRANCHES:
            raise ValueError(f"branches must be at least one, at most {_MOST_BRANCHES}; got {len(self.branches)}")
        if len(self.image_size) != 2:
            raise ValueError(f"image_size must be an int or (height, width), all positive; got {shown_value(size)}")
        for side in self.image_size:
            require_whole("image_size", side, 1, LARGEST)
        if math.prod(self.image_size) > _MOST_PIXELS:
            height, width = self.image_size
            raise ValueError(f"image_size must have at most {_MOST_PIXELS:,} pixels; got {height} x {width}")
        self._count_stages()
        self._check_fields()
        if self.multi_conv and not set(self.patch_size) <= {12, 16}:
            raise ValueError(f"three-convolution patch embedding needs patch_size 12 or 16; got {self.patch_size}")
        for axis, side in zip(("height", "width"), self.image_size, strict=True):
            if any(side * branch.image_scale % branch.patch_size for branch in self.branches):
                raise ValueError(self._bad_side(axis, side))
        for place, (branch, grid) in enumerate(zip(self.branches, self.grid_size, strict=True)):
            if any(side % branch.sr_ratio for side in grid):
                raise ValueError(
                    f"attention {branch.attention} of branch {place} does not divide its {grid[0]} x {grid[1]} patches"
                )
        if self.reduce_tokens == "none":
            self._set("reduce_tokens", None)
        self._check_reduction()

    def _check_reduction(self) -> None:
        reduction = self.reduction
        if reduction is None:
            return
        if reduction.kind == "fusion" and self.stages == 1:
            raise ValueError(f"reduce_tokens {self.reduce_tokens} is done between stages, and there is only one")
        for branch, (rows, columns) in enumerate(self.grid_size):
            patches, amount = rows * columns, reduction.amounts[branch]
            needs = ("full",) if reduction.kind != "fusion" else ("full", "separable")
            if amount != reduction.nothing and self.attention[branch] not in needs:
                raise ValueError(
                    f"reduce_tokens {self.reduce_tokens} needs {' or '.join(needs)} attention, and branch {branch} has "
                    f"{self.attention[branch]}"
                )
            if reduction.kind == "merge" and amount > patches // 2:
                raise ValueError(
                    f"reduce_tokens {self.reduce_tokens}: a block merges at most half of a branch's patches, which is "
                    f"{patches // 2} of the {patches} of branch {branch}; got {amount}"
                )
            if amount != reduction.nothing and reduction.left(branch, patches) == patches:
                raise ValueError(
                    f"reduce_tokens {self.reduce_tokens} leaves out none but one of the {patches} patches of branch "
                    f"{branch}, and what is left out becomes one token"
                )

    def _check_fields(self) -> None:
        if not isinstance(self.name, str) or not 0 < len(self.name) <= _LONGEST_NAME or not self.name.isprintable():
            raise ValueError(f"name must be a text of at most {_LONGEST_NAME} characters; got {shown_value(self.name)}")
        require_whole("in_chans", self.in_chans, 1, LARGEST)
        require_whole("num_classes", self.num_classes, 0, _MOST_CLASSES)  # 0: no head
        if self.global_pool not in ("token", "avg"):
            raise ValueError(f"global_pool must be 'token' or 'avg'; got {shown_value(self.global_pool)}")
        require_number("crop_pct", self.crop_pct, above=0, at_most=1)
        if self.crop_pct < _SMALLEST_CROP:  # of a picture resized a thousandfold
            raise ValueError(f"crop_pct must be at least {_SMALLEST_CROP}; got {self.crop_pct}")
        for field in ("multi_conv", "crop_scale", "qkv_bias"):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"{field} must be True or False; got {shown_value(getattr(self, field))}")
        for field in _RATES:
            value = getattr(self, field)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0.0 <= value < 1.0:
                raise ValueError(f"{field} must be a number in [0, 1); got {shown_value(value)}")

    def _count_stages(self) -> None:
        """Finds the number of stages; a number for each stage becomes one number where all are the same."""
        numbers = {"fusion_depth": [self.fusion_depth], "depth": list(self.depth)}
        numbers = [(field, value) for field, values in numbers.items() for value in values if isinstance(value, tuple)]
        if self.stages is None:
            self._set("stages", len(numbers[0][1]) if numbers else 3)
        require_whole("stages", self.stages, 1, DEEPEST)
        for field, value in numbers:
            if len(value) != self.stages:
                raise ValueError(f"{field} {value} has numbers for {len(value)} stages; there are {self.stages}")
        for depth in self.fusion_depths:
            require_whole("fusion_depth", depth, 0, DEEPEST)
        self._set("fusion_depth", _as_one(self.fusion_depth))
        self._set("branches", tuple(dataclasses.replace(b, depth=_as_one(b.depth)) for b in self.branches))

    def _bad_side(self, axis: str, side: int) -> str:
        # sizes that fit are the multiples of this: a branch sees a whole number of its patches
        step = math.lcm(*((branch.patch_size / branch.image_scale).numerator for branch in self.branches))
        below = max(step, side // step * step)
        patches = " and ".join(
            f"{float(side * branch.image_scale):g} pixels in patches of {branch.patch_size}" for branch in self.branches
        )
        return (
            f"image {axis} {side} does not divide into whole patches: the branches would see {patches}; "
            f"the nearest valid sizes are {below} and {below + step} (image_scale "
            f"{', '.join(map(str, self.image_scale))})"
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
    def stage_depths(self) -> tuple[tuple[int, ...], ...]:
        """The transformer blocks of each branch, for each stage."""
        return tuple(zip(*(_for_stages(depth, self.stages) for depth in self.depth), strict=True))

    @property
    def fusion_depths(self) -> tuple[int, ...]:
        """`fusion_depth` for each stage."""
        return _for_stages(self.fusion_depth, self.stages)

    @property
    def drop_path_rates(self) -> tuple[tuple[float, ...], ...]:
        """One slice per stage: block i of any branch takes slice[i], all fusions slice[-1] (timm's rule).

        A stage has as many rates as its deepest branch has blocks, and `fusion_depth` more. A branch that is shallower
        only ever gets the first rates of each slice. timm takes the last branch for the deepest when it sums them up:
        where that is not so, it has too few rates, and fails unless there is but one stage.
        """
        lengths = [max(depths) + fusion for depths, fusion in zip(self.stage_depths, self.fusion_depths, strict=True)]
        steps = max(1, sum(lengths) - 1)
        ends = itertools.accumulate(lengths)
        return tuple(
            tuple(self.drop_path_rate * position / steps for position in range(end - length, end))
            for end, length in zip(ends, lengths, strict=True)
        )

    def replace(self, **changes: Any) -> "CrossViTConfig":
        """These settings with some replaced.

        Args:
            **changes: fields, or the settings of branches (`embed_dim`, `depth`, …): tuples of one value per branch.

        Raises:
            TypeError: a name is no setting; the message lists those that are.
            ValueError: a value is refused.
        """
        accepted = [field.name for field in dataclasses.fields(self)] + list(BRANCH_SETTINGS)
        unknown = [name for name in changes if name not in accepted]
        if unknown:
            raise TypeError(f"unknown setting {', '.join(map(repr, unknown))}; accepted: {', '.join(accepted)}")
        if "branches" in changes:
            changes["branches"] = tuple(changes["branches"])
        given = {name: changes.pop(name) for name in BRANCH_SETTINGS if name in changes}
        if given:
            now = dataclasses.replace(self, branches=changes.get("branches", self.branches))
            values = {name: getattr(now, name) for name in BRANCH_SETTINGS} | given
            if _is_list(values["embed_dim"]) and len(values["embed_dim"]) != len(now.branches):  # other ones
                values |= {name: (value,) * len(values["embed_dim"]) for name, value in _USUAL.items()} | given
            for name, value in values.items():
                if not isinstance(value, tuple | list) or len(value) != len(values["embed_dim"]):
                    raise ValueError(f"{name} must be {len(values['embed_dim'])} values, one per branch; got {value}")
            rows = zip(*values.values(), strict=True)
            changes["branches"] = tuple(Branch(**dict(zip(BRANCH_SETTINGS, row, strict=True))) for row in rows)
        return dataclasses.replace(self, **changes)

    def at_patch_size(self, patch_size: Sequence[int]) -> "CrossViTConfig":
        """These settings with patches of other sizes: the branches see the same images, cut into other grids.

        Args:
            patch_size: pixels, one number per branch.

        Raises:
            ValueError: they do not divide the branches' images, or three convolutions embed the patches.
        """
        patch_size = tuple(patch_size)
        if patch_size == self.patch_size:
            return self
        whole = all(isinstance(size, int) and size >= 1 for size in patch_size)
        if len(patch_size) != len(self.branches) or not whole:
            raise ValueError(f"patch_size must be {len(self.branches)} whole numbers, one per branch; got {patch_size}")
        if self.multi_conv:
            raise ValueError(
                f"patch_size must stay {self.patch_size}, got {patch_size}: three convolutions embed the patches "
                "(multi_conv), whose strides fix the size; only a single convolution can be resized"
            )
        for branch, (image, size) in enumerate(zip(self.branch_image_size, patch_size, strict=True)):
            side = math.gcd(*image)
            if side % size:
                fitting = [str(divisor) for divisor in range(1, side + 1) if side % divisor == 0]
                raise ValueError(
                    f"patch_size {size} does not divide the image of branch {branch}, "
                    f"{' x '.join(map(str, image))} pixels; these do: {', '.join(fitting)}"
                )
        return self.replace(patch_size=patch_size)

    @property
    def reduction(self) -> Reduction | None:
        """`reduce_tokens`, read."""
        return None if self.reduce_tokens is None else Reduction.parse(self.reduce_tokens, self.branches)

    def require_all_tokens(self, what: str) -> None:
        """Raises ValueError for a model that reduces its tokens: `what` needs one for each patch."""
        if self.reduce_tokens is not None:
            raise ValueError(
                f"{what} needs a token for each patch, and this model has reduce_tokens {self.reduce_tokens}: take it "
                'with reduce_tokens="none"'
            )

    @property
    def is_stochastic(self) -> bool:
        """Whether training mode draws random numbers."""
        return any(getattr(self, rate) > 0.0 for rate in _RATES)

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Of each intermediate feature: channels, the side of its patches in pixels of the image, and timm's module."""
        return [
            {
                "num_chs": branch.embed_dim,
                "reduction": round(branch.patch_size / branch.image_scale),
                "module": f"blocks.{stage}",
            }
            for branch in self.branches
            for stage in range(self.stages)
        ]

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


def _for_stages(value: int | tuple[int, ...], stages: int) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,) * stages


def _as_one(value: int | tuple[int, ...]) -> int | tuple[int, ...]:
    return value[0] if isinstance(value, tuple) and len(set(value)) == 1 else value
