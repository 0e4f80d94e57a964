"""torch's resizing, exactly: bicubic with a = -0.75, and for features bilinear and by averages; no antialiasing.

`jax.image.resize` uses a = -0.5 and antialiases, which moves CrossViT's logits by 7-8 % of their range. Only
parameters, which are brought to other patch sizes, are resized in that way, as timm does it.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from crossvit_jax.kernels.resize import apply_matrices, interpolate, tap_matrix


def bicubic_taps(
    in_size: int, out_size: int, dtype: np.dtype
) -> tuple[Int[np.ndarray, "4 out_size"], Float[np.ndarray, "4 out_size"]]:
    """The four input pixels of which every output pixel along one axis is made, by their places, and their weights.

    The arithmetic runs in `dtype` step by step as in torch's `upsample_bicubic2d` (align_corners=False), so that the
    weights carry torch's own rounding: in float32 a source position is off by up to 1e-5 of a pixel.
    """
    real = np.dtype(dtype).type
    a = real(-0.75)

    def fma(x, y, z):
        """x · y + z rounded once, as compilers fuse it in torch's kernel."""
        return (np.longdouble(x) * y + z).astype(dtype)

    position = fma(real(in_size) / real(out_size), np.arange(out_size) + real(0.5), real(-0.5))
    first = np.floor(position)
    t = position - first

    def near(x):  # |distance| <= 1
        return fma(fma(a + 2, x, -(a + 3)) * x, x, 1)

    def far(x):  # 1 < |distance| < 2
        return fma(fma(fma(a, x, -5 * a), x, 8 * a), x, -4 * a)

    places = np.clip(first.astype(int) + np.arange(-1, 3)[:, None], 0, in_size - 1)  # outside pixels repeat the edge
    return places, np.stack([far(t + 1), near(t), near(1 - t), far(2 - t)])


def bicubic_matrix(in_size: int, out_size: int, dtype: np.dtype) -> Float[np.ndarray, "out_size in_size"]:
    """The weights of every input pixel in every output pixel along one axis, see `bicubic_taps`."""
    return tap_matrix(*bicubic_taps(in_size, out_size, dtype), in_size)


def scale_image(
    x: Float[Array, "batch in_height in_width channels"], size: tuple[int, int], crop_scale: bool = False
) -> Float[Array, "batch height width channels"]:
    """Brings images to `size` (height, width): bicubic, or a centre crop if `crop_scale` and the image is large enough.

    As timm's `scale_image`. Images that have the size already are returned untouched.
    """
    in_size = x.shape[1:3]
    if in_size == size:
        return x
    if crop_scale and size[0] <= in_size[0] and size[1] <= in_size[1]:
        top, left = (round((have - want) / 2.0) for have, want in zip(in_size, size, strict=True))
        return x[:, top : top + size[0], left : left + size[1]]
    real = jnp.promote_types(x.dtype, jnp.float32)  # torch computes half precision in float32 as well
    rows, columns = (bicubic_taps(have, want, real) for have, want in zip(in_size, size, strict=True))
    return interpolate(x.astype(real), rows, columns).astype(x.dtype)


def resize_bilinear(
    x: Float[Array, "batch in_rows in_columns channels"], size: tuple[int, int]
) -> Float[Array, "batch rows columns channels"]:
    """Brings features to `size` (rows, columns), as torch's `interpolate(mode="bilinear", align_corners=False)`.

    Features that have the size already are returned untouched.
    """
    if x.shape[1:3] == size:
        return x
    real = jnp.promote_types(x.dtype, jnp.float32)
    matrices = [bilinear_matrix(have, want, real) for have, want in zip(x.shape[1:3], size, strict=True)]
    return apply_matrices(x.astype(real), *matrices).astype(x.dtype)


def adaptive_average(
    x: Float[Array, "batch in_rows in_columns channels"], size: tuple[int, int]
) -> Float[Array, "batch rows columns channels"]:
    """Means over `size` (rows, columns) bins, as torch's `AdaptiveAvgPool2d`: they overlap if sides do not divide."""
    real = jnp.promote_types(x.dtype, jnp.float32)
    matrices = [average_matrix(have, want, real) for have, want in zip(x.shape[1:3], size, strict=True)]
    return apply_matrices(x.astype(real), *matrices).astype(x.dtype)


def resize_kernel(
    kernel: Float[Array, "size size in_chans out_chans"], size: int
) -> Float[Array, "new_size new_size in_chans out_chans"]:
    """A kernel that cuts patches, for patches of another size: the pi-resize of FlexiViT (arXiv 2212.08013).

    As timm's `resample_patch_embed`: where patches grow, the products of the new kernel with bicubically enlarged
    patches are those of the old kernel with the patches as they were. Differentiable, in float32 or wider.
    """
    real = jnp.promote_types(kernel.dtype, jnp.float32)
    matrix = kernel_matrix(kernel.shape[0], size).astype(real)
    as_image = kernel.astype(real).reshape(1, *kernel.shape[:2], -1)
    return apply_matrices(as_image, matrix, matrix).reshape(size, size, *kernel.shape[2:]).astype(kernel.dtype)


def resample_pos_embed(
    embedding: Float[Array, "1 tokens dim"], grid: tuple[int, int], new_grid: tuple[int, int]
) -> Float[Array, "1 new_tokens dim"]:
    """Position embeddings for another grid of (rows, columns); that of the class token stays as it is.

    As timm's `resample_abs_pos_embed`: bicubic, antialiased. Differentiable, in float32 or wider.
    """
    real = jnp.promote_types(embedding.dtype, jnp.float32)
    matrices = [antialiased_matrix(have, want).astype(real) for have, want in zip(grid, new_grid, strict=True)]
    patches = embedding[:, 1:].astype(real).reshape(1, *grid, -1)
    patches = apply_matrices(patches, *matrices).reshape(1, -1, embedding.shape[2])
    return jnp.concatenate([embedding[:, :1], patches.astype(embedding.dtype)], axis=1)


def kernel_matrix(size: int, new_size: int) -> Float[np.ndarray, "new_size size"]:
    """What `resize_kernel` multiplies by along each axis, in float64.

    The pseudo-inverse of resizing along both axes is that of each along its own.
    """
    return np.linalg.pinv(antialiased_matrix(size, new_size)).T


def antialiased_matrix(in_size: int, out_size: int) -> Float[np.ndarray, "out_size in_size"]:
    """The weights of every input pixel in every output pixel along one axis, in float64.

    Bicubic with a = -0.5, as torch's `interpolate(mode="bicubic", antialias=True)`: where pixels grow, the cubic is as
    wide as four of the new ones.
    """
    a, step = -0.5, in_size / out_size
    middle = step * (np.arange(out_size) + 0.5)
    x = np.abs(np.arange(in_size) + 0.5 - middle[:, None]) / max(step, 1.0)
    near = ((a + 2) * x - (a + 3)) * x * x + 1  # x <= 1
    far = a * (((x - 5) * x + 8) * x - 4)  # 1 < x <= 2
    weights = np.where(x <= 1, near, np.where(x <= 2, far, 0.0))
    return weights / weights.sum(axis=1, keepdims=True)


def bilinear_matrix(in_size: int, out_size: int, dtype: np.dtype) -> Float[np.ndarray, "out_size in_size"]:
    """The weights of every input pixel in every output pixel along one axis."""
    real = np.dtype(dtype).type
    position = np.maximum(real(in_size) / real(out_size) * (np.arange(out_size) + real(0.5)) - real(0.5), 0)
    first = np.floor(position)
    share = (position - first).astype(dtype)
    places = np.minimum(first.astype(int) + np.arange(2)[:, None], in_size - 1)
    return tap_matrix(places, np.stack([1 - share, share]), in_size)


def average_matrix(in_size: int, out_size: int, dtype: np.dtype) -> Float[np.ndarray, "out_size in_size"]:
    """The weights of every input pixel in every bin along one axis."""
    bins, pixels = np.arange(out_size)[:, None], np.arange(in_size)
    first, end = bins * in_size // out_size, -(-(bins + 1) * in_size // out_size)
    return ((first <= pixels) & (pixels < end)).astype(dtype) / (end - first).astype(dtype)
