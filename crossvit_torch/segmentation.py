"""Semantic segmentation: UPerNet's decoder, or Segmenter's, on the pyramid. Its losses are in `segmentation_loss`."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from crossvit_jax.config import SegmenterConfig, get_dense_config
from crossvit_torch.blocks import Block
from crossvit_torch.layers import Conv, GroupNorm, LayerNorm, Linear, OutputConv, ReLU, draw_normal
from crossvit_torch.pyramid import DenseModel
from crossvit_torch.resize import adaptive_average, resize_bilinear

_POOL_SCALES = (1, 2, 3, 6)  # bins along each side, in pyramid pooling


def num_groups(width: int) -> int:
    """Of group norm: 32, as far as a group has 8 channels or more, since some maps are a single pixel."""
    return math.gcd(32, width // 8)


class ConvModule(nn.Module):
    """A convolution with group norm and ReLU (transformers `UperNetConvModule`, which has batch norm)."""

    def __init__(
        self, dim: int, width: int, kernel_size: int, *, param_dtype: torch.dtype = torch.float32, device=None
    ):
        super().__init__()
        kwargs = {"dtype": param_dtype, "device": device}
        self.conv = Conv(dim, width, kernel_size, padding=kernel_size // 2, bias=False, **kwargs)
        self.norm = GroupNorm(num_groups(width), width, **kwargs)
        self.activation = ReLU()

    def forward(self, x: Float[Tensor, "batch dim rows columns"]) -> Float[Tensor, "batch width rows columns"]:
        return self.activation(self.norm(self.conv(x)))


class SCSE(nn.Module):
    """Concurrent spatial and channel attention (arXiv 1803.02579): what matters where, and which channels do."""

    def __init__(self, dim: int, reduction: int = 16, *, param_dtype: torch.dtype = torch.float32, device=None):
        super().__init__()
        kwargs = {"dtype": param_dtype, "device": device}
        self.reduce = Conv(dim, dim // reduction, 1, **kwargs)
        self.activation = ReLU()
        self.expand = Conv(dim // reduction, dim, 1, **kwargs)
        self.spatial = Conv(dim, 1, 1, **kwargs)

    def forward(self, x: Float[Tensor, "batch dim rows columns"]) -> Float[Tensor, "batch dim rows columns"]:
        channels = self.expand(self.activation(self.reduce(adaptive_average(x, (1, 1)))))
        return x * channels.sigmoid() + x * self.spatial(x).sigmoid()


class UPerDecoder(nn.Module):
    """UPerNet (arXiv 1807.10221): pyramid pooling of the coarsest level, then top-down sums, then all levels as one.

    Args:
        width: channels of the levels and within.
        num_levels: how many levels there are.
        scse: whether `SCSE` comes before the classifier.
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        num_levels: int,
        *,
        scse: bool = False,
        param_dtype: torch.dtype = torch.float32,
        device=None,
    ):
        super().__init__()
        kwargs = {"param_dtype": param_dtype, "device": device}
        self.psp_modules = nn.ModuleList(ConvModule(width, width, 1, **kwargs) for _ in _POOL_SCALES)
        self.bottleneck = ConvModule((1 + len(_POOL_SCALES)) * width, width, 3, **kwargs)
        self.lateral_convs = nn.ModuleList(ConvModule(width, width, 1, **kwargs) for _ in range(num_levels - 1))
        self.fpn_convs = nn.ModuleList(ConvModule(width, width, 3, **kwargs) for _ in range(num_levels - 1))
        self.fpn_bottleneck = ConvModule(num_levels * width, width, 3, **kwargs)
        if scse:
            self.scse = SCSE(width, **kwargs)
        self.has_scse = scse
        self.classifier = OutputConv(width, num_classes, 1, dtype=param_dtype, device=device)

    def forward(self, levels: list[Float[Tensor, "batch dim _ _"]]) -> Float[Tensor, "batch classes rows columns"]:
        """Logits on the grid of the finest level."""
        laterals = [lateral(x) for lateral, x in zip(self.lateral_convs, levels[:-1], strict=True)]
        laterals.append(self.bottleneck(self._pooled(levels[-1])))
        for i in range(len(laterals) - 1, 0, -1):
            laterals[i - 1] = laterals[i - 1] + resize_bilinear(laterals[i], tuple(laterals[i - 1].shape[2:]))
        outs = [conv(x) for conv, x in zip(self.fpn_convs, laterals[:-1], strict=True)] + laterals[-1:]
        x = self.fpn_bottleneck(torch.cat([resize_bilinear(x, tuple(outs[0].shape[2:])) for x in outs], dim=1))
        return self.classifier(self.scse(x) if self.has_scse else x)

    def _pooled(self, x: Float[Tensor, "batch dim rows columns"]) -> Float[Tensor, "batch _ rows columns"]:
        """A level beside its averages over fewer and fewer bins."""
        parts = [x]
        for scale, module in zip(_POOL_SCALES, self.psp_modules, strict=True):
            parts.append(resize_bilinear(module(adaptive_average(x, (scale, scale))), tuple(x.shape[2:])))
        return torch.cat(parts, dim=1)


class MaskTransformer(nn.Module):
    """Segmenter's mask transformer (arXiv 2105.05633): points and a token for each class attend over one another.

    A point's logits are the cosines of its vector and those of the classes, normalised.
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        num_blocks: int,
        num_heads: int,
        *,
        drop_path_rate: float = 0.0,
        param_dtype: torch.dtype = torch.float32,
        device=None,
    ):
        super().__init__()
        kwargs = {"dtype": param_dtype, "device": device}
        self.proj_dec = Linear(width, width, **kwargs)
        self.cls_emb = nn.Parameter(draw_normal(torch.empty(1, num_classes, width, **kwargs), 0.02))
        self.blocks = nn.ModuleList(
            Block(width, num_heads, 4.0, drop_path=drop_path_rate, param_dtype=param_dtype, device=device)
            for _ in range(num_blocks)
        )
        self.decoder_norm = LayerNorm(width, **kwargs)
        self.proj_patch = Linear(width, width, bias=False, **kwargs)
        self.proj_classes = Linear(width, width, bias=False, **kwargs)
        # Segmenter's epsilon. Where a pixel's cosines are nearly alike, the norm enlarges what rounding makes of them,
        # the more the smaller epsilon is.
        self.mask_norm = LayerNorm(num_classes, 1e-5, **kwargs)

    def forward(self, levels: list[Float[Tensor, "batch dim _ _"]]) -> Float[Tensor, "batch classes rows columns"]:
        """Logits on the grid of the only level."""
        (level,) = levels
        batch, _, rows, columns = level.shape
        x = self.proj_dec(level.flatten(2).transpose(1, 2))
        x = torch.cat([x, self.cls_emb.to(x.dtype).expand(batch, -1, -1)], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_norm(x)
        real = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(real)
            patches, classes = self.proj_patch(x[:, : rows * columns]), self.proj_classes(x[:, rows * columns :])
            masks = torch.einsum("bpd,bkd->bpk", _unit(patches), _unit(classes))
            return self.mask_norm(masks).transpose(1, 2).reshape(batch, -1, rows, columns)


def _unit(x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
    return x / x.square().sum(-1, keepdim=True).sqrt()


class CrossViTSegmenter(DenseModel):
    """A segmenter: CrossViT, the pyramid, and a decoder. Arguments are those of `DenseModel`."""

    def __init__(
        self,
        config: SegmenterConfig,
        *,
        dtype: torch.dtype | None = None,
        param_dtype: torch.dtype = torch.float32,
        device=None,
    ):
        super().__init__(config, dtype=dtype, param_dtype=param_dtype, device=device)
        kwargs = {"param_dtype": param_dtype, "device": device}
        if config.decoder == "mask":
            kwargs |= {"drop_path_rate": config.backbone.drop_path_rate}
            heads = config.width // config.head_width
            self.decoder = MaskTransformer(config.width, config.num_classes, config.num_blocks, heads, **kwargs)
        else:
            levels = len(config.strides)
            self.decoder = UPerDecoder(config.width, config.num_classes, levels, scse=config.scse, **kwargs)

    def forward(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch classes height width"]:
        """The logits of every pixel, in float32 or wider.

        Args:
            images: channels first, ImageNet-normalised, of the model's size.

        Raises:
            ValueError: wrong shape or dtype of the images.
        """
        with self._precision(images):
            logits = self.decoder(self._levels(images))
        return resize_bilinear(logits, self.config.image_size)

    def no_weight_decay(self) -> set[str]:
        """Also the mask transformer's class tokens."""
        return super().no_weight_decay() | ({"decoder.cls_emb"} if self.config.decoder == "mask" else set())


def create_segmenter(
    name: str, *, dtype: torch.dtype | None = None, param_dtype: torch.dtype = torch.float32, device=None, **overrides
) -> CrossViTSegmenter:
    """A freshly initialised segmenter. `convert.load_torch(source, task="segmentation")` makes one of trained weights.

    Args:
        name: of the variant, by its short, timm or IBM name, see `list_variants`.
        dtype, param_dtype, device: see `DenseModel`.
        **overrides: `num_classes`, which is needed, `decoder` and other settings, see `get_dense_config`.

    Raises:
        ValueError, TypeError: see `get_dense_config`.
    """
    config = get_dense_config("segmentation", name, **overrides)
    return CrossViTSegmenter(config, dtype=dtype, param_dtype=param_dtype, device=device)
