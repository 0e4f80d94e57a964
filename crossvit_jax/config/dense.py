"""The settings of detectors and segmenters: a CrossViT, a pyramid of maps, and what stands on it. No framework."""

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

from crossvit_jax.config.branch import BRANCH_SETTINGS, LARGEST, require_whole
from crossvit_jax.config.crossvit import CrossViTConfig
from crossvit_jax.config.settings import Settings
from crossvit_jax.config.variants import get_config

# the pyramid's channels at 240 pixels, chosen so that what stands on the body costs less than the body
_WIDTHS = {"ti": 128, "9": 128, "9-dagger": 128, "s": 192, "15": 192, "15-dagger": 192, "18": 192, "18-dagger": 192}
_WIDTHS |= {"15-dagger-408": 192, "18-dagger-408": 192, "b": 256}
_GROUP_NORM_WIDTH = 32  # torchvision's head has 32 groups


def _of_backbone(field: str) -> property:
    return property(lambda config: getattr(config.backbone, field))


@dataclass(frozen=True, kw_only=True)
class DenseConfig(Settings):
    """What detectors and segmenters have in common.

    Raises ValueError for settings that make no model, naming the value and what is accepted.
    """

    task: ClassVar[str]
    _of_strides: ClassVar[tuple[str, ...]] = ()  # fields that get their defaults where the strides change

    backbone: CrossViTConfig  # its `num_classes` becomes 0
    num_classes: int
    width: int | None = None  # channels of every level and of what stands on it; none: by variant, else 128
    # Of the levels, in pixels of the image, the finest first: half the stride of the first branch's patches or that
    # stride, then twice the one before. None: see `default_strides`.
    strides: tuple[int, ...] | None = None

    name = _of_backbone("name")
    branches = _of_backbone("branches")
    image_size = _of_backbone("image_size")
    image_scale = _of_backbone("image_scale")
    branch_image_size = _of_backbone("branch_image_size")
    in_chans = _of_backbone("in_chans")
    crop_pct = _of_backbone("crop_pct")
    is_stochastic = _of_backbone("is_stochastic")

    def __post_init__(self):
        self._set("backbone", self.backbone.replace(num_classes=0))
        self.backbone.require_all_tokens(f"a model for {self.task}")
        if self.width is None:
            self._set("width", _WIDTHS.get(self.name, 128))
        self._set("strides", self.default_strides if self.strides is None else tuple(self.strides))
        require_whole("num_classes", self.num_classes, 1, LARGEST)
        require_whole("width", self.width, self.width_step, LARGEST)
        if self.width % self.width_step:
            raise ValueError(f"width must be a multiple of {self.width_step}; got {self.width}")
        stride = self.map_stride
        firsts = [stride / 2, stride] if stride % 2 == 0 else [stride]
        fits = bool(self.strides) and self.strides[0] in firsts
        if not fits or any(b != 2 * a for a, b in itertools.pairwise(self.strides)):
            known = " or ".join(f"{first:g}" for first in firsts)
            raise ValueError(f"strides must begin at {known} and double from level to level; got {self.strides}")

    @property
    def width_step(self) -> int:
        """What `width` must be a multiple of."""
        return _GROUP_NORM_WIDTH

    @property
    def default_strides(self) -> tuple[int, ...]:
        """Four levels: 6, 12, 24 and 48 for patches of 12 pixels."""
        return self._strides(4)

    def _strides(self, levels: int) -> tuple[int, ...]:
        stride = self.map_stride
        first = stride // 2 if stride % 2 == 0 else stride
        return tuple(first * 2**level for level in range(levels))

    @property
    def map_stride(self) -> int:
        """The stride of the first branch's patches in pixels of the image: that of the map before the pyramid."""
        return _stride(self.backbone)

    @property
    def shrinks(self) -> tuple[int, ...]:
        """How many times each level halves the first branch's grid; -1 doubles it."""
        return tuple(int(math.log2(stride / self.map_stride)) for stride in self.strides)

    @property
    def level_grids(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of each level. A grid of odd sides is halved upwards: its last points lie at the border."""
        rows_columns = self.backbone.grid_size[0]
        return tuple(tuple(math.ceil(side / 2**shrink) for side in rows_columns) for shrink in self.shrinks)

    def replace(self, **changes: Any) -> "DenseConfig":
        """These settings with some replaced: own fields, or settings of the backbone (`image_size`, …).

        Other strides get the usual distances unless these are given.

        Raises:
            TypeError: a name is no setting; the message lists those that are.
            ValueError: a value is refused.
        """
        own, of_backbone = _split(type(self), changes)
        backbone = own.pop("backbone", self.backbone).replace(**of_backbone)
        if _stride(backbone) != self.map_stride:
            own = {"strides": None, **own}
        if own.get("strides", self.strides) != self.strides:
            own = {**dict.fromkeys(self._of_strides), **own}
        return dataclasses.replace(self, backbone=backbone, **own)


def _stride(backbone: CrossViTConfig) -> int:
    """The pixels of the image from one patch of the first branch to the next."""
    stride = backbone.patch_size[0] / backbone.image_scale[0]
    if stride.denominator != 1:
        raise ValueError(f"the first branch must have patches of whole pixels of the image; they have {stride}")
    return int(stride)


def _split(config: type, settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings that are fields of the config, and those of its backbone. Raises TypeError for any other."""
    own = {field.name for field in dataclasses.fields(config)}
    known = own | {field.name for field in dataclasses.fields(CrossViTConfig)} | set(BRANCH_SETTINGS)
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise TypeError(f"unknown setting {', '.join(map(repr, unknown))}; accepted: {', '.join(sorted(known))}")
    return {k: v for k, v in settings.items() if k in own}, {k: v for k, v in settings.items() if k not in own}


@dataclass(frozen=True, kw_only=True)
class DetectorConfig(DenseConfig):
    """Everything that defines a detector: FCOS (arXiv 2006.09214) on the pyramid."""

    task: ClassVar[str] = "detection"
    _of_strides: ClassVar[tuple[str, ...]] = ("distances",)

    num_convs: int | None = None  # 3 x 3 convolutions of each tower of the head; none: 4 from a width of 256 on, else 2
    # The levels share the boxes by the longest distance from a point to a side of its box, in pixels: these are where
    # one level ends and the next begins. None: at 8 times a level's stride, as in torchvision. For training only, but
    # where no strides are given there are as many levels as these tell.
    distances: tuple[int | float, ...] | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.num_convs is None:
            self._set("num_convs", 4 if self.width >= 256 else 2)
        require_whole("num_convs", self.num_convs, 1, LARGEST)
        distances = tuple(8.0 * stride for stride in self.strides[:-1]) if self.distances is None else self.distances
        self._set("distances", tuple(map(float, distances)))
        count = len(self.strides) - 1
        ascending = (0.0, *self.distances, math.inf)
        if len(self.distances) != count or any(a >= b for a, b in itertools.pairwise(ascending)):
            raise ValueError(
                f"distances must be {count} ascending numbers, between {count + 1} levels; got {distances}"
            )

    @property
    def distance_ranges(self) -> tuple[tuple[float, float], ...]:
        """Of each level: its boxes have a longest distance above the first number and below the second."""
        return tuple(zip((0.0, *self.distances), (*self.distances, math.inf), strict=True))

    @property
    def default_strides(self) -> tuple[int, ...]:
        return super().default_strides if self.distances is None else self._strides(len(self.distances) + 1)

    def replace(self, **changes: Any) -> "DenseConfig":
        """See `DenseConfig.replace`; other distances get their own strides unless these are given."""
        return super().replace(**({} if changes.get("distances") is None else {"strides": None}) | changes)


@dataclass(frozen=True, kw_only=True)
class SegmenterConfig(DenseConfig):
    """Everything that defines a segmenter.

    The decoder `upernet` (arXiv 1807.10221) joins all levels by convolutions; `mask` is Segmenter's mask transformer
    (arXiv 2105.05633), in which a token for each class attends over the points of a single level.
    """

    task: ClassVar[str] = "segmentation"

    decoder: str = "upernet"
    scse: bool = False  # upernet: concurrent spatial and channel attention (arXiv 1803.02579) before the classifier
    num_blocks: int = 2  # mask: transformer blocks

    def __post_init__(self):
        if self.decoder not in ("upernet", "mask"):
            raise ValueError(f"decoder must be 'upernet' or 'mask'; got {self.decoder!r}")
        super().__post_init__()
        require_whole("num_blocks", self.num_blocks, 1, LARGEST)
        if self.decoder == "mask" and len(self.strides) != 1:
            raise ValueError(f"the decoder 'mask' attends over one level; got strides {self.strides}")
        if self.decoder == "mask" and self.scse:
            raise ValueError("scse is a part of the decoder 'upernet'")

    @property
    def width_step(self) -> int:
        return self.head_width if self.decoder == "mask" else _GROUP_NORM_WIDTH

    @property
    def head_width(self) -> int:
        """Channels of each attention head of the decoder `mask`."""
        return 64

    @property
    def default_strides(self) -> tuple[int, ...]:
        return (self.map_stride,) if self.decoder == "mask" else super().default_strides

    def replace(self, **changes: Any) -> "DenseConfig":
        """See `DenseConfig.replace`; another decoder gets its own strides unless these are given."""
        other = changes.get("decoder", self.decoder) != self.decoder
        return super().replace(**({"strides": None} if other else {}) | changes)


CONFIGS = {config.task: config for config in (DetectorConfig, SegmenterConfig)}


def get_dense_config(task: str, name: str, **overrides: Any) -> DenseConfig:
    """The settings of a variant's detector or segmenter, with some replaced.

    Args:
        task: "detection" or "segmentation".
        name: of the variant, see `crossvit_jax.get_config`.
        **overrides: `num_classes`, which is needed, and other fields of `DetectorConfig` or `SegmenterConfig`; or
            settings of the backbone: `image_size`, `image_scale`, `drop_path_rate`, …

    Raises:
        ValueError, TypeError: as `crossvit_jax.get_config`; or `num_classes` is missing.
    """
    return build_dense_config(task, get_config(name, num_classes=0), **overrides)


def build_dense_config(task: str, backbone: CrossViTConfig, **overrides: Any) -> DenseConfig:
    """The settings of a detector or segmenter around a backbone; see `get_dense_config`."""
    if task not in CONFIGS:
        raise ValueError(f"task must be {' or '.join(map(repr, CONFIGS))}; got {task!r}")
    if "num_classes" not in overrides:
        raise TypeError(f"num_classes is missing: how many classes the {task} is to tell apart")
    if "backbone" in overrides:
        raise TypeError("the backbone is told by its name and settings")
    own, of_backbone = _split(CONFIGS[task], overrides)
    return CONFIGS[task](backbone=backbone.replace(**of_backbone), **own)
