"""Layers with gradients written by hand: less work, or fewer arrays kept, than those that jax would derive."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from crossvit_jax.kernels.sharding import is_cut, vary_alike

_SQRT_HALF = math.sqrt(0.5)


def convolve_patches(
    x: Float[Array, "batch height width in_chans"],
    kernel: Float[Array, "size size in_chans out_chans"],
    *args,
    **kwargs,
) -> Float[Array, "batch rows columns out_chans"]:
    """`jax.lax.conv_general_dilated` with strides as long as the kernel, whose gradients on a CPU are matrix products.

    There XLA's own take longer. By its compiler's estimate, a TPU would lose 4 % of a step by the kernel's product.
    """
    x, kernel = vary_alike(x, kernel)
    size, _, in_chans, out_chans = kernel.shape

    def plain(x: Array, kernel: Array) -> Array:
        return jax.lax.conv_general_dilated(x, kernel, *args, **kwargs)

    def forward(x: CustomVJPPrimal, kernel: CustomVJPPrimal) -> tuple[Array, tuple[Array, Array | None]]:
        # images need no gradient when a model is trained
        return plain(x.value, kernel.value), (x.value, kernel.value if x.perturbed else None)

    def kernel_by_product(x: Array, d_y: Array) -> Array:
        batch, rows, columns, _ = d_y.shape
        patches = x[:, : rows * size, : columns * size].reshape(batch, rows, size, columns, size, in_chans)
        patches = patches.swapaxes(2, 3).reshape(batch * rows * columns, size * size * in_chans)
        return (patches.T @ d_y.reshape(-1, out_chans)).reshape(kernel.shape)

    def kernel_by_convolution(x: Array, d_y: Array) -> Array:
        (d_kernel,) = jax.linear_transpose(lambda kernel: plain(x, kernel), kernel)(d_y)
        return d_kernel

    def image_by_product(kernel: Array, d_y: Array) -> Array:
        batch, rows, columns, _ = d_y.shape
        patches = d_y.reshape(-1, out_chans) @ kernel.reshape(-1, out_chans).T
        patches = patches.reshape(batch, rows, columns, size, size, in_chans).swapaxes(2, 3)
        seen = patches.reshape(batch, rows * size, columns * size, in_chans)
        unseen = [(0, whole - part) for whole, part in zip(x.shape, seen.shape, strict=True)]
        return jnp.pad(seen, unseen)

    def image_by_convolution(kernel: Array, d_y: Array) -> Array:
        (d_x,) = jax.linear_transpose(lambda x: plain(x, kernel), x)(d_y)
        return d_x

    def backward(inputs: tuple[Array, Array | None], d_y: Array) -> tuple[Array | None, Array]:
        x, kernel_for_d_x = inputs
        # how the patches of a batch lie that explicit axes of a mesh cut, jax cannot tell
        by_platform = _default_only if is_cut(d_y) else jax.lax.platform_dependent
        d_kernel = by_platform(x, d_y, cpu=kernel_by_product, default=kernel_by_convolution)
        if kernel_for_d_x is None:
            return None, d_kernel
        return by_platform(kernel_for_d_x, d_y, cpu=image_by_product, default=image_by_convolution), d_kernel

    convolve = jax.custom_vjp(plain)
    convolve.defvjp(forward, backward, symbolic_zeros=True)
    return convolve(x, kernel)


def convolve_same_size(
    x: Float[Array, "batch height width in_chans"],
    kernel: Float[Array, "rows columns in_chans out_chans"],
    *args,
    **kwargs,
) -> Float[Array, "batch height width out_chans"]:
    """`jax.lax.conv_general_dilated` with an odd kernel and an output as large as the input.

    Where maps are large, or outputs few, the kernel's gradient on a CPU is a matrix product for each of its places.
    XLA's own convolution takes 1.4 to 6 times as long on maps of 40 x 40 pixels, the more the larger the batch, and 10
    times for 4 outputs of 128 channels. On maps of 16 x 16 it is as fast.
    """
    x, kernel = vary_alike(x, kernel)
    by_hand = x.shape[1] * x.shape[2] > 256 or 2 * kernel.shape[-1] < x.shape[-1]

    def plain(x: Array, kernel: Array) -> Array:
        return jax.lax.conv_general_dilated(x, kernel, *args, **kwargs)

    def forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
        return plain(x, kernel), (x, kernel)

    def kernel_by_products(x: Array, d_y: Array) -> Array:
        (rows, columns), (height, width) = kernel.shape[:2], d_y.shape[1:3]
        pixels = x.reshape(-1, x.shape[-1])
        padded = jnp.pad(d_y, [(0, 0), (rows // 2, rows // 2), (columns // 2, columns // 2), (0, 0)])

        def product(row: int, column: int) -> Array:
            top, left = rows - 1 - row, columns - 1 - column
            seen = padded[:, top : top + height, left : left + width].reshape(len(pixels), -1)
            return jnp.matmul(seen.T, pixels, precision=kwargs.get("precision")).T

        return jnp.stack([jnp.stack([product(i, j) for j in range(columns)]) for i in range(rows)])

    def kernel_by_convolution(x: Array, d_y: Array) -> Array:
        (d_kernel,) = jax.linear_transpose(lambda kernel: plain(x, kernel), kernel)(d_y)
        return d_kernel

    def backward(inputs: tuple[Array, Array], d_y: Array) -> tuple[Array, Array]:
        x, kernel = inputs
        (d_x,) = jax.linear_transpose(lambda x: plain(x, kernel), x)(d_y)
        by_platform = jax.lax.platform_dependent if by_hand and not is_cut(d_y) else _default_only
        return d_x, by_platform(x, d_y, cpu=kernel_by_products, default=kernel_by_convolution)

    convolve = jax.custom_vjp(plain)
    convolve.defvjp(forward, backward)
    return convolve(x, kernel)


def _default_only(*args: Array, cpu: Callable[..., Array], default: Callable[..., Array]) -> Array:
    """In place of `jax.lax.platform_dependent`: on a CPU too, the default."""
    return default(*args)


def wide_einsum(subscripts: str, a: Array, b: Array) -> Array:
    """`jnp.einsum` of two arrays of half precision in float32, as tensor cores sum it; others in their own precision.

    The gradient is rounded to half precision first, for a product of both would be computed in float32.
    """
    return _wide_einsum(subscripts, *vary_alike(a, b))


def plain_wide_einsum(subscripts: str, a: Array, b: Array) -> Array:
    """The same with the gradient that jax derives, in forward mode too."""
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.promote_types(jnp.result_type(a, b), jnp.float32))


_wide_einsum = jax.custom_vjp(plain_wide_einsum, nondiff_argnums=(0,))


def _wide_einsum_backward(subscripts: str, inputs: tuple[Array, Array], d_y: Array) -> tuple[Array, Array]:
    a, b = inputs
    d_y = d_y.astype(jnp.result_type(a, b))
    (d_a,) = jax.linear_transpose(lambda a: jnp.einsum(subscripts, a, b), a)(d_y)
    (d_b,) = jax.linear_transpose(lambda b: jnp.einsum(subscripts, a, b), b)(d_y)
    return d_a, d_b


_wide_einsum.defvjp(lambda subscripts, a, b: (plain_wide_einsum(subscripts, a, b), (a, b)), _wide_einsum_backward)


def tokens_last(x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
    """The same array, which a TPU keeps with tokens last in memory: in the columns of its tiles.

    Norms then sum over rows, which takes fewer instructions, and attention has its tokens last too. By itself XLA would
    make one matrix of all images' tokens, and copy it from one order to the other.
    """

    def kept(x: Array) -> Array:
        return with_layout_constraint(x, Layout((0, 2, 1)))

    return jax.lax.platform_dependent(x, tpu=kept, default=lambda x: x)


def layer_norm(x: Array, scale: Array, bias: Array, epsilon: float) -> Array:
    """Layer norm over the last axis with the two-pass variance, in float32 or wider; keeps two numbers per row."""
    return _layer_norm(*vary_alike(x, scale, bias), epsilon)


def plain_layer_norm(x: Array, scale: Array, bias: Array, epsilon: float) -> Array:
    """The same with the gradient that jax derives, in forward mode too."""
    return _layer_norm_forward(x, scale, bias, epsilon)[0]


_layer_norm = jax.custom_vjp(plain_layer_norm, nondiff_argnums=(3,))


def _layer_norm_forward(x: Array, scale: Array, bias: Array, epsilon: float) -> tuple[Array, tuple[Array, ...]]:
    wide = _wide(x)
    mean = wide.mean(-1, keepdims=True)
    rstd = jax.lax.rsqrt(jnp.square(wide - mean).mean(-1, keepdims=True) + epsilon)
    return (wide - mean) * rstd * _as_row(scale, x) + _as_row(bias, x), (x, scale, bias, mean, rstd)


def _layer_norm_backward(epsilon: float, residuals: tuple[Array, ...], d_y: Array) -> tuple[Array, Array, Array]:
    x, scale, bias, mean, rstd = residuals
    mean, rstd = _kept_on_gpus(mean, rstd)
    normalised, d_normalised = (_wide(x) - mean) * rstd, d_y * _as_row(scale, x)
    d_x = rstd * (
        d_normalised
        - d_normalised.mean(-1, keepdims=True)
        - normalised * (d_normalised * normalised).mean(-1, keepdims=True)
    )
    rows = tuple(range(x.ndim - 1))
    return d_x.astype(x.dtype), (d_y * normalised).sum(rows).astype(scale.dtype), d_y.sum(rows).astype(bias.dtype)


def _kept_on_gpus(*arrays: Array) -> tuple[Array, ...]:
    """The arrays as they are. On GPUs, XLA would compute them again in each kernel that needs them."""

    def barrier(*arrays: Array) -> tuple[Array, ...]:
        return jax.lax.optimization_barrier(arrays)

    return jax.lax.platform_dependent(*arrays, cuda=barrier, rocm=barrier, default=lambda *arrays: arrays)


_layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def _as_row(parameter: Float[Array, " dim"], x: Float[Array, "*batch dim"]) -> Float[Array, "*ones dim"]:
    """With as many axes as x: under `jax_numpy_rank_promotion="raise"` jax adds none by itself."""
    return jnp.expand_dims(parameter, range(x.ndim - 1))


def plain_gelu(x: Array) -> Array:
    """x/2 (1 + erf(x/√2)) in float32 or wider, as torch computes it: erfc, which jax takes, is three times the work.

    Its gradient is the one that jax derives, in forward mode too.
    """
    wide = _wide(x)
    return (0.5 * wide * (1 + jax.lax.erf(wide * _SQRT_HALF))).astype(x.dtype)


def _gelu_backward(x: Array, d_y: Array) -> tuple[Array]:
    wide = _wide(jax.lax.optimization_barrier(x))  # else XLA keeps the forward pass's erf: more memory, no less time
    density = jnp.exp(-0.5 * jnp.square(wide)) * (_SQRT_HALF / math.sqrt(math.pi))
    slope = 0.5 * (1 + jax.lax.erf(wide * _SQRT_HALF)) + wide * density
    return ((_wide(d_y) * slope).astype(x.dtype),)


# by itself jax would keep three arrays of x's size for the backward pass, and write and read them all
gelu = jax.custom_vjp(plain_gelu)
gelu.defvjp(lambda x: (plain_gelu(x), x), _gelu_backward)


def _wide(x: Array) -> Array:
    """x in float32 or wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
