"""Self-attention, and cross-attention with one query."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from crossvit_jax.kernels.attention import dot_product_attention
from crossvit_jax.layers import Linear, dropout_is_active


def softmax(scores: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Softmax over the last axis, in float32 or wider; returned in that precision."""
    return jax.nn.softmax(scores.astype(jnp.promote_types(scores.dtype, jnp.float32)), axis=-1)


class Attention(nnx.Module):
    """Multi-head self-attention (timm `Attention`)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.implementation = "xla"
        self.qkv = Linear(dim, 3 * dim, use_bias=qkv_bias, **kwargs)
        self.attn_drop = nnx.Dropout(attn_drop)
        self.proj = Linear(dim, dim, **kwargs)
        self.proj_drop = nnx.Dropout(proj_drop)

    def __call__(
        self,
        x: Float[Array, "batch tokens dim"],
        *,
        rngs: nnx.Rngs | None = None,
        attn_maps: list | None = None,
    ) -> Float[Array, "batch tokens dim"]:
        """Each token attends over all. If `attn_maps` is given, (batch, heads, tokens, tokens) is appended to it."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        q, k, v = (x[:, :, 0] for x in jax.lax.split(qkv, (1, 1, 1), axis=2))  # whose gradient is a mere concatenation
        # weights that somebody wants to see, or that dropout thins, have to be computed as such
        if attn_maps is None and not dropout_is_active(self.attn_drop):
            x = dot_product_attention(q, k, v, self.implementation)
        else:
            attn = softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * self.scale)
            if attn_maps is not None:
                attn_maps.append(attn)
            attn = self.attn_drop(attn, rngs=rngs).astype(x.dtype)
            x = jnp.einsum("bhqk,bkhd->bqhd", attn, v)
        x = self.proj(x.reshape(batch, tokens, dim))
        return self.proj_drop(x, rngs=rngs)


class CrossAttention(nnx.Module):
    """The class token attends over all tokens: one query, so cost is linear in their number (paper §3.3, eq. 4)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.wq = Linear(dim, dim, use_bias=qkv_bias, **kwargs)
        self.wk = Linear(dim, dim, use_bias=qkv_bias, **kwargs)
        self.wv = Linear(dim, dim, use_bias=qkv_bias, **kwargs)
        self.attn_drop = nnx.Dropout(attn_drop)
        self.proj = Linear(dim, dim, **kwargs)
        self.proj_drop = nnx.Dropout(proj_drop)

    def __call__(
        self,
        x: Float[Array, "batch tokens dim"],
        *,
        rngs: nnx.Rngs | None = None,
        attn_maps: list | None = None,
    ) -> Float[Array, "batch 1 dim"]:
        """The first token attends over all. If `attn_maps` is given, (batch, heads, 1, tokens) is appended to it.

        With one query per head, the key and value projections fold into it: q·(W_k x) = (W_kᵀ q)·x and
        Σ aₙ W_v xₙ = W_v Σ aₙ xₙ, so no key or value is ever computed. The key bias adds the same number to every
        score of a head and drops out of the softmax.
        """
        batch, _, dim = x.shape
        per_head = (dim, self.num_heads, dim // self.num_heads)
        wk = self.wk.kernel[...].astype(x.dtype).reshape(per_head)
        wv = self.wv.kernel[...].astype(x.dtype).reshape(per_head)

        q = self.wq(x[:, :1]).reshape(batch, self.num_heads, dim // self.num_heads)
        q = jnp.einsum("chd,bhd->bhc", wk, q) * self.scale
        attn = softmax(jnp.einsum("bhc,bnc->bhn", q, x))
        if attn_maps is not None:
            attn_maps.append(attn[:, :, None])
        attn = self.attn_drop(attn, rngs=rngs).astype(x.dtype)

        x = jnp.einsum("bhn,bnc->bhc", attn, x)
        x = jnp.einsum("bhc,chd->bhd", x, wv)
        if self.wv.bias is not None:
            bias = self.wv.bias[...].astype(x.dtype).reshape(per_head[1:])
            # the weights sum to 1 unless dropout has thinned them
            x += bias * attn.sum(-1, keepdims=True) if dropout_is_active(self.attn_drop) else bias
        x = self.proj(x.reshape(batch, 1, dim))
        return self.proj_drop(x, rngs=rngs)
