"""The leaf layers with CrossViT's defaults: initialisation, epsilon, exact GELU."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.custom_derivatives import CustomVJPPrimal
from jaxtyping import Array, Float

_SQRT_HALF = math.sqrt(0.5)


def dropout_is_active(dropout: nnx.Dropout) -> bool:
    """Whether this layer would change its input now (training mode and a rate above 0)."""
    return dropout.rate > 0.0 and not dropout.deterministic


def _wide(x: Array) -> Array:
    """x in float32 or wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class Linear(nnx.Linear):
    """Linear layer with timm's initialisation: weights N(0, 0.02), biases 0.

    timm truncates at ±2, a hundred standard deviations away: no float32 draw ever gets there.
    """

    def __init__(self, in_features: int, out_features: int, *, use_bias: bool = True, dtype, param_dtype, rngs):
        super().__init__(
            in_features,
            out_features,
            use_bias=use_bias,
            kernel_init=nnx.initializers.normal(0.02),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "*batch in_features"]) -> Float[Array, "*batch out_features"]:
        # as one plain matrix product: for the weights' gradient of a batched one, XLA copies the input first on a CPU
        return super().__call__(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], self.out_features)


class Conv(nnx.Conv):
    """Convolution with torch's default initialisation: weights and biases U(±1/√fan_in)."""

    def __init__(self, in_chans: int, out_chans: int, kernel_size: int, *, stride: int, padding: int, **kwargs):
        bound = (in_chans * kernel_size**2) ** -0.5

        def uniform(key, shape, dtype):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        without_overlap = stride == kernel_size and padding == 0
        super().__init__(
            in_chans,
            out_chans,
            (kernel_size, kernel_size),
            strides=stride,
            padding=[(padding, padding)] * 2,
            kernel_init=uniform,
            bias_init=uniform,
            conv_general_dilated=_convolve_patches if without_overlap else jax.lax.conv_general_dilated,
            **kwargs,
        )


def _convolve_patches(
    x: Float[Array, "batch height width in_chans"],
    kernel: Float[Array, "size size in_chans out_chans"],
    *args,
    **kwargs,
) -> Float[Array, "batch rows columns out_chans"]:
    """`jax.lax.conv_general_dilated` with strides as long as the kernel, whose gradient on a CPU is one matrix product.

    There XLA's own takes longer. By its compiler's estimate, a TPU would lose 4 % of a step by the product.
    """

    def plain(x: Array, kernel: Array) -> Array:
        return jax.lax.conv_general_dilated(x, kernel, *args, **kwargs)

    def forward(x: CustomVJPPrimal, kernel: CustomVJPPrimal) -> tuple[Array, tuple[Array, Array | None]]:
        # images need no gradient when a model is trained
        return plain(x.value, kernel.value), (x.value, kernel.value if x.perturbed else None)

    def product(x: Array, d_y: Array) -> Array:
        size, _, in_chans, out_chans = kernel.shape
        batch, rows, columns, _ = d_y.shape
        patches = x[:, : rows * size, : columns * size].reshape(batch, rows, size, columns, size, in_chans)
        patches = patches.swapaxes(2, 3).reshape(batch * rows * columns, size * size * in_chans)
        return (patches.T @ d_y.reshape(-1, out_chans)).reshape(kernel.shape)

    def convolution(x: Array, d_y: Array) -> Array:
        (d_kernel,) = jax.linear_transpose(lambda kernel: plain(x, kernel), kernel)(d_y)
        return d_kernel

    def backward(inputs: tuple[Array, Array | None], d_y: Array) -> tuple[Array | None, Array]:
        x, kernel_for_d_x = inputs
        d_kernel = jax.lax.platform_dependent(x, d_y, cpu=product, default=convolution)
        if kernel_for_d_x is None:
            return None, d_kernel
        _, d_x = jax.vjp(lambda x: plain(x, kernel_for_d_x), x)
        return d_x(d_y)[0], d_kernel

    convolve = jax.custom_vjp(plain)
    convolve.defvjp(forward, backward, symbolic_zeros=True)
    return convolve(x, kernel)


class LayerNorm(nnx.LayerNorm):
    """Layer norm with epsilon 1e-6 and the two-pass variance, as torch computes it; statistics in float32 or wider."""

    def __init__(self, dim: int, *, dtype, param_dtype, rngs):
        super().__init__(dim, epsilon=1e-6, use_fast_variance=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        y = _layer_norm(x, self.scale[...], self.bias[...], self.epsilon)
        return y.astype(jnp.result_type(x, self.param_dtype) if self.dtype is None else self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _layer_norm(x: Array, scale: Array, bias: Array, epsilon: float) -> Array:
    return _layer_norm_forward(x, scale, bias, epsilon)[0]


def _layer_norm_forward(x: Array, scale: Array, bias: Array, epsilon: float) -> tuple[Array, tuple[Array, ...]]:
    wide = _wide(x)
    mean = wide.mean(-1, keepdims=True)
    rstd = jax.lax.rsqrt(jnp.square(wide - mean).mean(-1, keepdims=True) + epsilon)
    return (wide - mean) * rstd * scale + bias, (x, scale, bias, mean, rstd)


def _layer_norm_backward(epsilon: float, residuals: tuple[Array, ...], d_y: Array) -> tuple[Array, Array, Array]:
    x, scale, bias, mean, rstd = residuals
    normalised, d_normalised = (_wide(x) - mean) * rstd, d_y * scale
    d_x = rstd * (
        d_normalised
        - d_normalised.mean(-1, keepdims=True)
        - normalised * (d_normalised * normalised).mean(-1, keepdims=True)
    )
    rows = tuple(range(x.ndim - 1))
    return d_x.astype(x.dtype), (d_y * normalised).sum(rows).astype(scale.dtype), d_y.sum(rows).astype(bias.dtype)


_layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


class GELU(nnx.Module):
    """The exact (erf) GELU; jax's default is the tanh approximation."""

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return _gelu(x)


@jax.custom_vjp
def _gelu(x: Array) -> Array:
    """x/2 (1 + erf(x/√2)) in float32 or wider, as torch computes it: erfc, which jax takes, is three times the work."""
    wide = _wide(x)
    return (0.5 * wide * (1 + jax.lax.erf(wide * _SQRT_HALF))).astype(x.dtype)


def _gelu_backward(x: Array, d_y: Array) -> tuple[Array]:
    wide = _wide(jax.lax.optimization_barrier(x))  # else XLA keeps the forward pass's erf: more memory, no less time
    density = jnp.exp(-0.5 * jnp.square(wide)) * (_SQRT_HALF / math.sqrt(math.pi))
    slope = 0.5 * (1 + jax.lax.erf(wide * _SQRT_HALF)) + wide * density
    return ((_wide(d_y) * slope).astype(x.dtype),)


# by itself jax would keep three arrays of x's size for the backward pass, and write and read them all
_gelu.defvjp(lambda x: (_gelu(x), x), _gelu_backward)


class ReLU(nnx.Module):
    """max(x, 0), a module so that it takes its place in a `Sequential`, as in torch."""

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return jnp.maximum(x, 0)


class Identity(nnx.Module):
    """Returns its input: the head of a model without classes."""

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return x


class Sequential(nnx.List):
    """A list of layers applied in order. Unlike `nnx.Sequential`, it adds no name of its own to parameter paths."""

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        for layer in self:
            x = layer(x)
        return x
