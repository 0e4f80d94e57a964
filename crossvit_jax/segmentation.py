"""Semantic segmentation: UPerNet's decoder, or Segmenter's, on the pyramid. Its losses are in `segmentation_loss`."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from crossvit_jax.blocks import Block
from crossvit_jax.config import SegmenterConfig, get_dense_config
from crossvit_jax.layers import Conv, GroupNorm, LayerNorm, Linear, OutputConv, ReLU
from crossvit_jax.pyramid import DenseModel
from crossvit_jax.resize import adaptive_average, resize_bilinear

_POOL_SCALES = (1, 2, 3, 6)  # bins along each side, in pyramid pooling


def num_groups(width: int) -> int:
    """Of group norm: 32, as far as a group has 8 channels or more, since some maps are a single pixel."""
    return math.gcd(32, width // 8)


class ConvModule(nnx.Module):
    """A convolution with group norm and ReLU (transformers `UperNetConvModule`, which has batch norm)."""

    def __init__(self, dim: int, width: int, kernel_size: int, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs):
        kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.conv = Conv(dim, width, kernel_size, padding=kernel_size // 2, use_bias=False, **kwargs)
        self.norm = GroupNorm(num_groups(width), width, **kwargs)
        self.activation = ReLU()

    def __call__(self, x: Float[Array, "batch rows columns dim"]) -> Float[Array, "batch rows columns width"]:
        return self.activation(self.norm(self.conv(x)))


class SCSE(nnx.Module):
    """Concurrent spatial and channel attention (arXiv 1803.02579): what matters where, and which channels do."""

    def __init__(self, dim: int, reduction: int = 16, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs):
        kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.reduce = Conv(dim, dim // reduction, 1, **kwargs)
        self.activation = ReLU()
        self.expand = Conv(dim // reduction, dim, 1, **kwargs)
        self.spatial = Conv(dim, 1, 1, **kwargs)

    def __call__(self, x: Float[Array, "batch rows columns dim"]) -> Float[Array, "batch rows columns dim"]:
        channels = self.expand(self.activation(self.reduce(adaptive_average(x, (1, 1)))))
        return x * jax.nn.sigmoid(channels) + x * jax.nn.sigmoid(self.spatial(x))


class UPerDecoder(nnx.Module):
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
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.psp_modules = nnx.List(ConvModule(width, width, 1, **kwargs) for _ in _POOL_SCALES)
        self.bottleneck = ConvModule((1 + len(_POOL_SCALES)) * width, width, 3, **kwargs)
        self.lateral_convs = nnx.List(ConvModule(width, width, 1, **kwargs) for _ in range(num_levels - 1))
        self.fpn_convs = nnx.List(ConvModule(width, width, 3, **kwargs) for _ in range(num_levels - 1))
        self.fpn_bottleneck = ConvModule(num_levels * width, width, 3, **kwargs)
        if scse:
            self.scse = SCSE(width, **kwargs)
        self.has_scse = scse
        self.classifier = OutputConv(width, num_classes, 1, **kwargs)

    def __call__(
        self, levels: list[Float[Array, "batch _ _ dim"]], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "batch rows columns classes"]:
        """Logits on the grid of the finest level."""
        laterals = [lateral(x) for lateral, x in zip(self.lateral_convs, levels[:-1], strict=True)]
        laterals.append(self.bottleneck(self._pooled(levels[-1])))
        for i in range(len(laterals) - 1, 0, -1):
            laterals[i - 1] += resize_bilinear(laterals[i], laterals[i - 1].shape[1:3])
        outs = [conv(x) for conv, x in zip(self.fpn_convs, laterals[:-1], strict=True)] + laterals[-1:]
        x = self.fpn_bottleneck(jnp.concatenate([resize_bilinear(x, outs[0].shape[1:3]) for x in outs], axis=-1))
        return self.classifier(self.scse(x) if self.has_scse else x)

    def _pooled(self, x: Float[Array, "batch rows columns dim"]) -> Float[Array, "batch rows columns _"]:
        """A level beside its averages over fewer and fewer bins."""
        parts = [x]
        for scale, module in zip(_POOL_SCALES, self.psp_modules, strict=True):
            parts.append(resize_bilinear(module(adaptive_average(x, (scale, scale))), x.shape[1:3]))
        return jnp.concatenate(parts, axis=-1)


class MaskTransformer(nnx.Module):
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
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        real = {**kwargs, "dtype": jnp.promote_types(param_dtype, jnp.float32)}
        self.proj_dec = Linear(width, width, **kwargs)
        tokens = nnx.initializers.normal(0.02)(rngs.params(), (1, num_classes, width), param_dtype)
        self.cls_emb = nnx.Param(tokens)
        self.blocks = nnx.List(
            Block(width, num_heads, 4.0, drop_path=drop_path_rate, **kwargs) for _ in range(num_blocks)
        )
        self.decoder_norm = LayerNorm(width, **kwargs)
        self.proj_patch = Linear(width, width, use_bias=False, **real)
        self.proj_classes = Linear(width, width, use_bias=False, **real)
        # Segmenter's epsilon. Where a pixel's cosines are nearly alike, the norm enlarges what rounding makes of them,
        # the more the smaller epsilon is.
        self.mask_norm = LayerNorm(num_classes, 1e-5, **real)

    def __call__(
        self, levels: list[Float[Array, "batch _ _ dim"]], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "batch rows columns classes"]:
        """Logits on the grid of the only level."""
        (level,) = levels
        batch, rows, columns, dim = level.shape
        x = self.proj_dec(level.reshape(batch, rows * columns, dim))
        tokens = jnp.broadcast_to(self.cls_emb[...].astype(x.dtype), (batch, *self.cls_emb.shape[1:]))
        x = jnp.concatenate([x, tokens], axis=1)
        for block in self.blocks:
            x = block(x, rngs=rngs)
        x = self.decoder_norm(x)
        patches, classes = self.proj_patch(x[:, : rows * columns]), self.proj_classes(x[:, rows * columns :])
        masks = jnp.einsum("bpd,bkd->bpk", _unit(patches), _unit(classes))
        return self.mask_norm(masks).reshape(batch, rows, columns, -1)


def _unit(x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
    return x / jnp.sqrt(jnp.square(x).sum(-1, keepdims=True))


class CrossViTSegmenter(DenseModel):
    """A segmenter: CrossViT, the pyramid, and a decoder. Arguments are those of `DenseModel`."""

    def __init__(self, config: SegmenterConfig, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        kwargs = {"dtype": self.dtype, "param_dtype": self.param_dtype, "rngs": rngs}
        if config.decoder == "mask":
            kwargs |= {"drop_path_rate": config.backbone.drop_path_rate}
            heads = config.width // config.head_width
            self.decoder = MaskTransformer(config.width, config.num_classes, config.num_blocks, heads, **kwargs)
        else:
            levels = len(config.strides)
            self.decoder = UPerDecoder(config.width, config.num_classes, levels, scse=config.scse, **kwargs)

    def __call__(
        self, images: Float[Array, "batch height width channels"], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "batch height width classes"]:
        """The logits of every pixel, in float32 or wider.

        Args:
            images: channels last, ImageNet-normalised, of the model's size.
            rngs: stream `dropout`, for training mode.

        Raises:
            ValueError: wrong shape or dtype of the images; or training mode without `rngs`.
        """
        logits = self.decoder(self._levels(images, rngs), rngs=rngs)
        return resize_bilinear(logits, self.config.image_size)

    def no_weight_decay(self) -> set[str]:
        """Also the mask transformer's class tokens."""
        return super().no_weight_decay() | ({"decoder.cls_emb"} if self.config.decoder == "mask" else set())


def create_segmenter(
    name: str, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs | None = None, **overrides
) -> CrossViTSegmenter:
    """A freshly initialised segmenter. `convert.load_flax(source, task="segmentation")` makes one of trained weights.

    Args:
        name: of the variant, by its short, timm or IBM name, see `list_variants`.
        dtype, param_dtype, rngs: see `DenseModel`.
        **overrides: `num_classes`, which is needed, `decoder` and other settings, see `get_dense_config`.

    Raises:
        ValueError, TypeError: see `get_dense_config`; or `rngs` is missing.
    """
    config = get_dense_config("segmentation", name, **overrides)
    if rngs is None:
        raise TypeError("fresh weights are drawn from rngs=nnx.Rngs(seed), which is missing")
    return CrossViTSegmenter(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
