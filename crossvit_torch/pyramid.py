"""CrossViT as a backbone: both branches' patches in one map, and maps of several strides made of it."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from crossvit_jax.config import DenseConfig
from crossvit_torch.crossvit import CrossViT
from crossvit_torch.layers import Conv, LayerNorm2d, Linear
from crossvit_torch.resize import resize_bilinear


class PyramidLevel(nn.Module):
    """One level of a simple pyramid (ViTDet, arXiv 2203.16527): the map, resized, then two convolutions with norms.

    Args:
        dim: channels of the map.
        width: channels of the level.
        shrink: how many times the map is halved, by maxima; -1 doubles it. That is a transposed convolution of 2 x 2
            pixels, written as the linear layer that it is: one for each of the four pixels that a patch becomes.
    """

    def __init__(self, dim: int, width: int, shrink: int, *, param_dtype: torch.dtype = torch.float32, device=None):
        super().__init__()
        kwargs = {"dtype": param_dtype, "device": device}
        self.shrink = shrink
        if shrink < 0:
            self.up = Linear(dim, 4 * (dim // 2), **kwargs)
            dim = dim // 2
        self.conv1 = Conv(dim, width, 1, bias=False, **kwargs)
        self.norm1 = LayerNorm2d(width, **kwargs)
        self.conv2 = Conv(width, width, 3, padding=1, bias=False, **kwargs)
        self.norm2 = LayerNorm2d(width, **kwargs)

    def forward(self, x: Float[Tensor, "batch dim in_rows in_columns"]) -> Float[Tensor, "batch width rows columns"]:
        if self.shrink < 0:
            x = double(self.up(x.permute(0, 2, 3, 1)))
        for _ in range(self.shrink):
            x = halve(x)
        x = self.norm1(self.conv1(x))
        return self.norm2(self.conv2(x))


def double(x: Float[Tensor, "batch in_rows in_columns four_dims"]) -> Float[Tensor, "batch dim rows columns"]:
    """Each pixel's channels as a square of 2 x 2 pixels, row by row."""
    batch, rows, columns, dim = x.shape
    x = x.reshape(batch, rows, columns, 2, 2, dim // 4).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(batch, dim // 4, 2 * rows, 2 * columns)


def halve(x: Float[Tensor, "batch dim in_rows in_columns"]) -> Float[Tensor, "batch dim rows columns"]:
    """The maxima of squares of 2 x 2 pixels; where a side is odd, the last ones are cut by the border."""
    return functional.max_pool2d(x, 2, ceil_mode=True)


class SimplePyramid(nn.Module):
    """The patches of all branches in one map of the first branch's grid, and a level for each stride.

    Args:
        config: of the detector or segmenter.
    """

    def __init__(self, config: DenseConfig, *, param_dtype: torch.dtype = torch.float32, device=None):
        super().__init__()
        kwargs = {"param_dtype": param_dtype, "device": device}
        dims = config.backbone.embed_dim
        self.fuse = Linear(sum(dims), max(dims), dtype=param_dtype, device=device)
        self.levels = nn.ModuleList(
            PyramidLevel(max(dims), config.width, shrink, **kwargs) for shrink in config.shrinks
        )

    def forward(self, maps: list[Float[Tensor, "batch _ _ _"]]) -> list[Float[Tensor, "batch dim _ _"]]:
        """The levels (batch, width, rows, columns), the finest first, of a map for each branch."""
        grid = tuple(maps[0].shape[2:])
        x = torch.cat([resize_bilinear(x, grid) for x in maps], dim=1)
        x = self.fuse(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return [level(x) for level in self.levels]


class PyramidBackbone(nn.Module):
    """A CrossViT without a head, and the pyramid on it."""

    def __init__(
        self,
        config: DenseConfig,
        *,
        dtype: torch.dtype | None = None,
        param_dtype: torch.dtype = torch.float32,
        device=None,
    ):
        super().__init__()
        kwargs = {"param_dtype": param_dtype, "device": device}
        self.body = CrossViT(config.backbone, dtype=dtype, **kwargs)
        self.pyramid = SimplePyramid(config, **kwargs)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> list[Float[Tensor, "batch dim _ _"]]:
        """The levels (batch, width, rows, columns), the finest first."""
        return self.pyramid(self.body.forward_patches(images))


class DenseModel(nn.Module):
    """What detectors and segmenters have in common: the backbone, and what a trainer asks of a model.

    Args:
        config: of the detector or segmenter.
        dtype: of the computation; default: `param_dtype`. Half precision keeps softmax, norm statistics, the last
            layers and what the model returns in float32.
        param_dtype: of the parameters.
        device: where they live.
    """

    def __init__(
        self,
        config: DenseConfig,
        *,
        dtype: torch.dtype | None = None,
        param_dtype: torch.dtype = torch.float32,
        device=None,
    ):
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.backbone = PyramidBackbone(config, dtype=dtype, param_dtype=param_dtype, device=device)

    @property
    def param_dtype(self) -> torch.dtype:
        """Follows `model.double()` and the like."""
        return self.backbone.body.param_dtype

    @property
    def num_classes(self) -> int:
        return self.config.num_classes

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """See `CrossViT.set_grad_checkpointing`: the body's blocks."""
        self.backbone.body.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """See `CrossViT.no_weight_decay`."""
        return {f"{_BODY}{name}" for name in self.backbone.body.no_weight_decay()}

    def is_head(self, name: str) -> bool:
        """Whether a parameter, by its dotted name, stands on the body: it is trained where the body is frozen."""
        return not name.startswith(_BODY)

    def unused(self, name: str) -> bool:
        """Whether a parameter, by its dotted name, has no part in the model, see `CrossViT.unused_by_patches`.

        It is kept in the model and its files, so that a classifier can be made of them; train it in no way.
        """
        return name.startswith(_BODY) and self.backbone.body.unused_by_patches(name.removeprefix(_BODY))

    def layer_of(self, name: str) -> int:
        """See `CrossViT.layer_of`. What stands on the body is in its last layer, with its final norms."""
        return self.backbone.body.layer_of(name.removeprefix(_BODY) if name.startswith(_BODY) else "head")

    def _levels(self, images: Float[Tensor, "batch channels height width"]) -> list[Float[Tensor, "batch dim _ _"]]:
        """The backbone's levels; refuses images of another size, whose pixels the result would not be in."""
        size = tuple(images.shape[2:])
        if images.ndim == 4 and size != self.config.image_size:
            raise ValueError(_bad_size(size, self.config.image_size))
        return self.backbone(images)

    def _precision(self, images: Tensor) -> torch.autocast:
        return self.backbone.body._precision(images)


def _bad_size(size: tuple[int, ...], expected: tuple[int, int]) -> str:
    (height, width), (want_height, want_width) = size, expected
    return f"images must be {want_height} x {want_width} pixels, as the model's; got {height} x {width}"


_BODY = "backbone.body."
