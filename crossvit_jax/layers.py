"""The leaf layers with CrossViT's defaults: initialisation, epsilon, exact GELU."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from crossvit_jax.kernels.layers import (
    convolve_patches,
    convolve_same_size,
    gelu,
    layer_norm,
    plain_gelu,
    plain_layer_norm,
    plain_wide_einsum,
    wide_einsum,
)


def dropout_is_active(dropout: nnx.Dropout) -> bool:
    """Whether this layer would change its input now (training mode and a rate above 0)."""
    return dropout.rate > 0.0 and not dropout.deterministic


class Linear(nnx.Linear):
    """Linear layer with timm's initialisation: weights N(0, 0.02), biases 0.

    timm truncates at ±2, a hundred standard deviations away: no float32 draw ever gets there.

    After `set_wide`, half precision is multiplied as such, and the sums, to which the bias is added, stay in float32.
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
        self.set_wide(False)
        self.set_tokens_last(False)
        self.set_forward_mode(False)

    def set_wide(self, enable: bool) -> None:
        """Whether a layer of half precision returns float32."""
        self.wide = enable and self.dtype is not None and jnp.dtype(self.dtype).itemsize == 2

    def set_tokens_last(self, enable: bool) -> None:
        """Whether tokens (batch, tokens, features) are multiplied in the order of `kernels.layers.tokens_last`."""
        self.tokens_last = enable

    def set_forward_mode(self, enable: bool) -> None:
        """See `CrossViT.set_forward_mode`."""
        self.wide_einsum = plain_wide_einsum if enable else wide_einsum

    def __call__(self, x: Float[Array, "*batch in_features"]) -> Float[Array, "*batch out_features"]:
        if self.tokens_last and x.ndim == 3:
            return self._with_tokens_last(x)
        # as one plain matrix product: for the weights' gradient of a batched one, XLA copies the input first on a CPU
        rows = x.reshape(-1, x.shape[-1])
        y = self._in_float32(rows) if self.wide else super().__call__(rows)
        return y.reshape(*x.shape[:-1], self.out_features)

    def _in_float32(self, x: Float[Array, "rows in_features"]) -> Float[Array, "rows out_features"]:
        y = self.wide_einsum("ri,io->ro", *self.promote_dtype((x, self.kernel[...]), dtype=self.dtype))
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)[None]

    def _with_tokens_last(self, x: Float[Array, "batch tokens _"]) -> Float[Array, "batch tokens _"]:
        einsum = self.wide_einsum if self.wide else jnp.einsum
        y = einsum("bni,io->bon", *self.promote_dtype((x, self.kernel[...]), dtype=self.dtype))
        if self.bias is not None:
            y += self.bias[...].astype(y.dtype)[None, :, None]
        return y.swapaxes(1, 2)


class Conv(nnx.Conv):
    """Convolution with torch's default initialisation, weights and biases U(±1/√fan_in), unless told otherwise."""

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int = 0,
        kernel_init: nnx.Initializer | None = None,
        bias_init: nnx.Initializer | None = None,
        **kwargs,
    ):
        bound = (in_chans * kernel_size**2) ** -0.5

        def uniform(key, shape, dtype):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        super().__init__(
            in_chans,
            out_chans,
            (kernel_size, kernel_size),
            strides=stride,
            padding=((padding, padding),) * 2,  # no list, so that a graph definition can be hashed
            kernel_init=kernel_init or uniform,
            bias_init=bias_init or uniform,
            **kwargs,
        )
        self.cuts_patches = stride == kernel_size and padding == 0
        self.keeps_size = stride == 1 and kernel_size == 2 * padding + 1 > 1
        self.set_forward_mode(False)

    def cut_patches(
        self, x: Float[Array, "batch height width in_chans"], kernel: Float[Array, "size size in_chans out_chans"]
    ) -> Float[Array, "batch rows columns out_chans"]:
        """What this convolution makes of patches of another size, by a kernel of theirs."""
        x, kernel, bias = self.promote_dtype((x, kernel, self.bias[...]), dtype=self.dtype)
        layout = ("NHWC", "HWIO", "NHWC")
        return self.conv_general_dilated(x, kernel, kernel.shape[:2], "VALID", dimension_numbers=layout) + bias

    def set_forward_mode(self, enable: bool) -> None:
        """See `CrossViT.set_forward_mode`."""
        by_hand = convolve_patches if self.cuts_patches else convolve_same_size
        can_be = (self.cuts_patches or self.keeps_size) and not enable
        self.conv_general_dilated = by_hand if can_be else jax.lax.conv_general_dilated


class OutputConv(Conv):
    """A convolution whose result leaves the model: computed in float32 or wider, in a model of half precision too.

    Its kernel is odd, and the result as large as the input.
    """

    def __init__(self, in_chans: int, out_chans: int, kernel_size: int, *, dtype, param_dtype, **kwargs):
        real = {"dtype": jnp.promote_types(param_dtype, jnp.float32), "param_dtype": param_dtype}
        super().__init__(in_chans, out_chans, kernel_size, padding=kernel_size // 2, **real, **kwargs)


class LayerNorm(nnx.LayerNorm):
    """Layer norm with the two-pass variance, as torch computes it; statistics in float32 or wider."""

    def __init__(self, dim: int, eps: float = 1e-6, *, dtype, param_dtype, rngs):
        super().__init__(dim, epsilon=eps, use_fast_variance=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.set_forward_mode(False)

    def set_forward_mode(self, enable: bool) -> None:
        """See `CrossViT.set_forward_mode`."""
        self.layer_norm = plain_layer_norm if enable else layer_norm

    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        y = self.layer_norm(x, self.scale[...], self.bias[...], self.epsilon)
        return y.astype(jnp.result_type(x, self.param_dtype) if self.dtype is None else self.dtype)


LayerNorm2d = LayerNorm  # of maps: their channels are last as well


class GroupNorm(nnx.GroupNorm):
    """Group norm of maps with torch's epsilon and the two-pass variance; statistics in float32 or wider."""

    def __init__(self, num_groups: int, num_channels: int, *, dtype, param_dtype, rngs):
        super().__init__(
            num_channels,
            num_groups=num_groups,
            epsilon=1e-5,
            use_fast_variance=False,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )


class GELU(nnx.Module):
    """The exact (erf) GELU; jax's default is the tanh approximation."""

    def __init__(self):
        self.set_forward_mode(False)

    def set_forward_mode(self, enable: bool) -> None:
        """See `CrossViT.set_forward_mode`."""
        self.gelu = plain_gelu if enable else gelu

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return self.gelu(x)


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
