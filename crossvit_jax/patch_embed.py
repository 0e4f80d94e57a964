"""Images to patch tokens."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from crossvit_jax.layers import Conv, ReLU, Sequential
from crossvit_jax.resize import resize_kernel


class PatchEmbed(nnx.Module):
    """Cuts images into patches and embeds each: one convolution, or three (the dagger variants, paper §4.1).

    The three have the same total stride as the one: 4 · 3 · 1 for patches of 12 pixels, 4 · 2 · 2 for 16.
    """

    def __init__(
        self,
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        *,
        multi_conv: bool = False,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.patch_size = patch_size
        kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        if multi_conv:
            # (stride, padding) of the second and of the third convolution
            (stride2, padding2), (stride3, padding3) = {12: ((3, 0), (1, 1)), 16: ((2, 1), (2, 1))}[patch_size]
            self.proj = Sequential(
                [
                    Conv(in_chans, embed_dim // 4, 7, stride=4, padding=3, **kwargs),
                    ReLU(),
                    Conv(embed_dim // 4, embed_dim // 2, 3, stride=stride2, padding=padding2, **kwargs),
                    ReLU(),
                    Conv(embed_dim // 2, embed_dim, 3, stride=stride3, padding=padding3, **kwargs),
                ]
            )
        else:
            self.proj = Conv(in_chans, embed_dim, patch_size, stride=patch_size, padding=0, **kwargs)

    def __call__(
        self, x: Float[Array, "batch height width channels"], patch_size: int | None = None
    ) -> Float[Array, "batch patches dim"]:
        """Patches of another size need a kernel that one convolution has, and three have not."""
        if patch_size in (None, self.patch_size):
            x = self.proj(x)
        else:
            x = self.proj.cut_patches(x, resize_kernel(self.proj.kernel[...], patch_size))
        batch, rows, columns, dim = x.shape
        return x.reshape(batch, rows * columns, dim)
