"""CrossViT as a backbone: both branches' patches in one map, and maps of several strides made of it."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from crossvit_jax.config import DenseConfig
from crossvit_jax.crossvit import CrossViT
from crossvit_jax.layers import Conv, LayerNorm2d, Linear
from crossvit_jax.resize import resize_bilinear


class PyramidLevel(nnx.Module):
    """One level of a simple pyramid (ViTDet, arXiv 2203.16527): the map, resized, then two convolutions with norms.

    Args:
        dim: channels of the map.
        width: channels of the level.
        shrink: how many times the map is halved, by maxima; -1 doubles it. That is a transposed convolution of 2 x 2
            pixels, written as the linear layer that it is: one for each of the four pixels that a patch becomes.
    """

    def __init__(self, dim: int, width: int, shrink: int, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs):
        kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.shrink = shrink
        if shrink < 0:
            self.up = Linear(dim, 4 * (dim // 2), **kwargs)
            dim = dim // 2
        self.conv1 = Conv(dim, width, 1, use_bias=False, **kwargs)
        self.norm1 = LayerNorm2d(width, **kwargs)
        self.conv2 = Conv(width, width, 3, padding=1, use_bias=False, **kwargs)
        self.norm2 = LayerNorm2d(width, **kwargs)

    def __call__(self, x: Float[Array, "batch in_rows in_columns dim"]) -> Float[Array, "batch rows columns width"]:
        if self.shrink < 0:
            x = double(self.up(x))
        for _ in range(self.shrink):
            x = halve(x)
        x = self.norm1(self.conv1(x))
        return self.norm2(self.conv2(x))


def double(x: Float[Array, "batch in_rows in_columns four_dims"]) -> Float[Array, "batch rows columns dim"]:
    """Each pixel's channels as a square of 2 x 2 pixels, row by row."""
    batch, rows, columns, dim = x.shape
    x = x.reshape(batch, rows, columns, 2, 2, dim // 4).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, 2 * rows, 2 * columns, dim // 4)


def halve(x: Float[Array, "batch in_rows in_columns dim"]) -> Float[Array, "batch rows columns dim"]:
    """The maxima of squares of 2 x 2 pixels; where a side is odd, the last ones are cut by the border."""
    ends = [(0, side % 2) for side in x.shape[1:3]]
    return nnx.max_pool(x, (2, 2), strides=(2, 2), padding=ends)


class SimplePyramid(nnx.Module):
    """The patches of all branches in one map of the first branch's grid, and a level for each stride.

    Args:
        config: of the detector or segmenter.
    """

    def __init__(self, config: DenseConfig, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs):
        kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        dims = config.backbone.embed_dim
        self.fuse = Linear(sum(dims), max(dims), **kwargs)
        self.levels = nnx.List(PyramidLevel(max(dims), config.width, shrink, **kwargs) for shrink in config.shrinks)

    def __call__(self, maps: list[Float[Array, "batch _ _ _"]]) -> list[Float[Array, "batch _ _ dim"]]:
        """The levels (batch, rows, columns, width), the finest first, of a map for each branch."""
        grid = maps[0].shape[1:3]
        x = self.fuse(jnp.concatenate([resize_bilinear(x, grid) for x in maps], axis=-1))
        return [level(x) for level in self.levels]


class PyramidBackbone(nnx.Module):
    """A CrossViT without a head, and the pyramid on it."""

    def __init__(self, config: DenseConfig, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs):
        kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.body = CrossViT(config.backbone, **kwargs)
        self.pyramid = SimplePyramid(config, **kwargs)

    def __call__(
        self, images: Float[Array, "batch height width channels"], *, rngs: nnx.Rngs | None = None
    ) -> list[Float[Array, "batch _ _ dim"]]:
        """The levels (batch, rows, columns, width), the finest first."""
        return self.pyramid(self.body.forward_patches(images, rngs=rngs))


class DenseModel(nnx.Module):
    """What detectors and segmenters have in common: the backbone, and what a trainer asks of a model.

    Args:
        config: of the detector or segmenter.
        dtype: of the computation; default: `param_dtype`. Half precision keeps softmax, norm statistics, resizing, the
            last layers and what the model returns in float32.
        param_dtype: of the parameters.
        rngs: draws the initial parameters; used in no other way.
    """

    def __init__(self, config: DenseConfig, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.dtype = jnp.dtype(param_dtype if dtype is None else dtype)
        self.param_dtype = jnp.dtype(param_dtype)
        self.backbone = PyramidBackbone(config, dtype=self.dtype, param_dtype=self.param_dtype, rngs=rngs)

    @property
    def num_classes(self) -> int:
        return self.config.num_classes

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """See `CrossViT.set_grad_checkpointing`: the body's blocks."""
        self.backbone.body.set_grad_checkpointing(enable)

    # these reach every module below
    set_attention = CrossViT.set_attention
    set_fp32_residual = CrossViT.set_fp32_residual
    set_forward_mode = CrossViT.set_forward_mode

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

    def _levels(
        self, images: Float[Array, "batch height width channels"], rngs: nnx.Rngs | None
    ) -> list[Float[Array, "batch _ _ dim"]]:
        """The backbone's levels; refuses images of another size, whose pixels the result would not be in."""
        size = images.shape[1:3]
        if images.ndim == 4 and size != self.config.image_size:
            raise ValueError(_bad_size(size, self.config.image_size))
        return self.backbone(images, rngs=rngs)


def _bad_size(size: tuple[int, ...], expected: tuple[int, int]) -> str:
    (height, width), (want_height, want_width) = size, expected
    return f"images must be {want_height} x {want_width} pixels, as the model's; got {height} x {width}"


_BODY = "backbone.body."
