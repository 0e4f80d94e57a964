"""Self-attention, and cross-attention with one query."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from crossvit_jax.kernels.attention import cudnn_with_one_more, dot_product_attention, project_by_head
from crossvit_jax.kernels.layers import plain_wide_einsum, wide_einsum
from crossvit_jax.layers import Conv, LayerNorm, Linear, dropout_is_active
from crossvit_jax.reduce import Size, log_size


def softmax(
    scores: Float[Array, "batch *shape tokens"], size: Size | None = None
) -> Float[Array, "batch *shape tokens"]:
    """Softmax over the last axis, in float32 or wider; returned in that precision. Tokens count by their size."""
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    if size is not None:
        scores += jnp.expand_dims(log_size(size), range(1, scores.ndim - 1))
    return jax.nn.softmax(scores, axis=-1)


class Attention(nnx.Module):
    """Multi-head self-attention (timm `Attention`).

    Args:
        head_dim: width of a head, where the heads do not fill `dim`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.num_heads = num_heads
        self.head_dim = head_dim or dim // num_heads
        self.scale = self.head_dim**-0.5
        self.implementation = "xla"
        self.set_forward_mode(False)
        width = num_heads * self.head_dim
        self.qkv = Linear(dim, 3 * width, use_bias=qkv_bias, **kwargs)
        self.attn_drop = nnx.Dropout(attn_drop)
        self.proj = Linear(width, dim, **kwargs)
        self.proj_drop = nnx.Dropout(proj_drop)

    def set_forward_mode(self, enable: bool) -> None:
        """See `CrossViT.set_forward_mode`."""
        self.forward_mode = enable

    def __call__(
        self, x: Float[Array, "batch tokens dim"], size: Size | None = None, *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "batch tokens dim"]:
        """Each token attends over all.

        Args:
            size: the patches that each token stands for, see `crossvit_jax.reduce`; None: one each.
        """
        trains = not (self.attn_drop.deterministic or self._needs_weights())
        if self.implementation == "cudnn" and x.shape[1] % 2 and size is None and trains:
            # The norm before can write one token more, and the sum after leave it out, as they write and read all of
            # them anyway. Where `dot_product_attention` adds it, four arrays are copied.
            out = cudnn_with_one_more(*self.per_head(jnp.pad(x, ((0, 0), (0, 1), (0, 0)))))
            return self.proj_drop(self._project(out)[:, :-1], rngs=rngs)
        return self.attend(*self.per_head(x), size, rngs=rngs)

    def attend(
        self,
        q: Float[Array, "batch tokens heads width"],
        k: Float[Array, "batch keys heads width"],
        v: Float[Array, "batch keys heads width"],
        size: Size | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "batch tokens dim"]:
        """The same for what `per_head` returns."""
        if self._needs_weights():
            attn = self.attn_drop(self._softmax(q, k, size), rngs=rngs).astype(v.dtype)
            out = jnp.einsum("bhqk,bkhd->bqhd", attn, v)
        elif size is None:
            out = dot_product_attention(q, k, v, self.implementation)
        else:
            out = dot_product_attention(q, k, v, self.implementation, log_size(size))
        return self.proj_drop(self._project(out), rngs=rngs)

    def weights(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch heads tokens tokens"]:
        """How much each token (last axis but one) attends to each, in float32 or wider."""
        q, k, _ = self.per_head(x)
        return self._softmax(q, k)

    def class_weights(
        self,
        q: Float[Array, "batch tokens heads width"],
        k: Float[Array, "batch tokens heads width"],
        size: Size | None = None,
    ) -> Float[Array, "batch heads tokens"]:
        """How much the first token attends to each, of what `per_head` returns, in float32 or wider."""
        return self._softmax(q[:, :1], k, size)[:, :, 0]

    def per_head(self, x: Float[Array, "batch tokens dim"]) -> list[Float[Array, "batch tokens heads width"]]:
        """Queries, keys and values."""
        if self.implementation == "tpu":
            parameters = (self.qkv.kernel[...], None if self.qkv.bias is None else self.qkv.bias[...])
            return project_by_head(*self.qkv.promote_dtype((x, *parameters), dtype=self.qkv.dtype), self.num_heads)
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim)
        return [x[:, :, 0] for x in jax.lax.split(qkv, (1, 1, 1), axis=2)]  # whose gradient is a mere concatenation

    def _project(self, out: Float[Array, "batch tokens heads width"]) -> Float[Array, "batch tokens dim"]:
        return self.proj(out.reshape(*out.shape[:2], out.shape[2] * out.shape[3]))

    def _needs_weights(self) -> bool:
        """Weights that dropout thins have to be computed as such."""
        return dropout_is_active(self.attn_drop) or self.forward_mode

    def _softmax(self, q: Array, k: Array, size: Size | None = None) -> Float[Array, "batch heads queries tokens"]:
        return softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * self.scale, size)


class SpatialReductionAttention(Attention):
    """Self-attention over fewer keys than tokens (arXiv 2106.13797; timm `pvt_v2.Attention`, but for the epsilon).

    A convolution makes one token of each square of patches, and a norm follows: these have the keys and values. The
    class token, which timm's does not know, bypasses both, and has a key of its own.

    Args:
        sr_ratio: rows and columns of patches in a square.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        sr_ratio: int,
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
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.sr_ratio = sr_ratio
        self.implementation = "xla"
        self.set_forward_mode(False)
        self.q = Linear(dim, dim, use_bias=qkv_bias, **kwargs)
        self.kv = Linear(dim, 2 * dim, use_bias=qkv_bias, **kwargs)
        self.attn_drop = nnx.Dropout(attn_drop)
        self.proj = Linear(dim, dim, **kwargs)
        self.proj_drop = nnx.Dropout(proj_drop)
        self.sr = Conv(dim, dim, sr_ratio, stride=sr_ratio, **kwargs)
        self.norm = LayerNorm(dim, **kwargs)

    def __call__(
        self, x: Float[Array, "batch tokens dim"], grid: tuple[int, int], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "batch tokens dim"]:
        """Each token attends over the class token and the squares.

        Args:
            grid: rows and columns of patches, which `sr_ratio` divides.
        """
        return self.attend(*self.per_head(x, grid), rngs=rngs)

    def weights(
        self, x: Float[Array, "batch tokens dim"], grid: tuple[int, int]
    ) -> Float[Array, "batch heads tokens tokens"]:
        """How much each token (last axis but one) attends to each, in float32 or wider: the patches of a square share
        its weight evenly."""
        q, k, _ = self.per_head(x, grid)
        attn, (rows, columns), side = self._softmax(q, k), grid, self.sr_ratio
        squares = attn[..., 1:].reshape(*attn.shape[:3], rows // side, columns // side) / side**2
        patches = jnp.repeat(jnp.repeat(squares, side, axis=3), side, axis=4)
        return jnp.concatenate([attn[..., :1], patches.reshape(*attn.shape[:3], rows * columns)], axis=-1)

    def per_head(
        self, x: Float[Array, "batch tokens dim"], grid: tuple[int, int]
    ) -> list[Float[Array, "batch _ heads width"]]:
        """Queries of all tokens, and the keys and values of the class token and the squares, row by row."""
        batch, tokens, dim = x.shape
        squares = self.norm(self.sr(x[:, 1:].reshape(batch, *grid, dim)))
        reduced = jnp.concatenate([x[:, :1], squares.reshape(batch, -1, dim)], axis=1)
        kv = self.kv(reduced).reshape(batch, reduced.shape[1], 2, self.num_heads, self.head_dim)
        k, v = (x[:, :, 0] for x in jax.lax.split(kv, (1, 1), axis=2))
        return [self.q(x).reshape(batch, tokens, self.num_heads, self.head_dim), k, v]


class SeparableAttention(nnx.Module):
    """Self-attention whose cost is linear in the number of tokens (arXiv 2206.02680; timm `LinearSelfAttention`).

    Each token has one score. The sum of the keys, weighted by the scores' softmax, is the context of all tokens, and
    each multiplies its values, of which negative ones become 0, by it. The class token is a token as all others.
    """

    def __init__(
        self,
        dim: int,
        *,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.qkv = Linear(dim, 1 + 2 * dim, use_bias=qkv_bias, **kwargs)
        self.attn_drop = nnx.Dropout(attn_drop)
        self.proj = Linear(dim, dim, **kwargs)
        self.proj_drop = nnx.Dropout(proj_drop)

    def __call__(
        self, x: Float[Array, "batch tokens dim"], size: Size | None = None, *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "batch tokens dim"]:
        """What each token makes of the context; `size` is as in `Attention`."""
        score, k, v = jax.lax.split(self.qkv(x), (1, x.shape[-1], x.shape[-1]), axis=2)
        attn = self.attn_drop(softmax(score[:, :, 0], size), rngs=rngs).astype(k.dtype)
        context = jnp.einsum("bn,bnd->bd", attn, k)[:, None]
        return self.proj_drop(self.proj(jnp.maximum(v, 0) * context), rngs=rngs)

    def weights(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch 1 tokens tokens"]:
        """How much each token (last axis but one) attends to each, which is the same for all, in float32 or wider."""
        batch, tokens, _ = x.shape
        attn = softmax(self.qkv(x)[:, :, 0])
        return jnp.broadcast_to(attn[:, None, None], (batch, 1, tokens, tokens))


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
        self.set_forward_mode(False)
        self.wq = Linear(dim, dim, use_bias=qkv_bias, **kwargs)
        self.wk = Linear(dim, dim, use_bias=qkv_bias, **kwargs)
        self.wv = Linear(dim, dim, use_bias=qkv_bias, **kwargs)
        self.attn_drop = nnx.Dropout(attn_drop)
        self.proj = Linear(dim, dim, **kwargs)
        self.proj_drop = nnx.Dropout(proj_drop)

    def set_forward_mode(self, enable: bool) -> None:
        """See `CrossViT.set_forward_mode`."""
        self.einsum = plain_wide_einsum if enable else wide_einsum

    def __call__(
        self, x: Float[Array, "batch tokens dim"], size: Size | None = None, *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "batch 1 dim"]:
        """The first token attends over all; `size` is as in `Attention`.

        With one query per head, the key and value projections fold into it: q·(W_k x) = (W_kᵀ q)·x and
        Σ aₙ W_v xₙ = W_v Σ aₙ xₙ, so no key or value is ever computed. The key bias adds the same number to every
        score of a head and drops out of the softmax. Sums of half precision, which are of the one query's size, stay in
        float32 until they are multiplied.
        """
        batch, _, dim = x.shape
        attn = self.attn_drop(self._softmax(x, size), rngs=rngs)
        x = jnp.einsum("bhn,bnc->bhc", attn.astype(x.dtype), x)
        x = self.einsum("bhc,chd->bhd", x, self._per_head(self.wv, x.dtype))
        if self.wv.bias is not None:
            bias = self.wv.bias[...].astype(x.dtype).reshape(1, *x.shape[1:])
            # the weights sum to 1 unless dropout has thinned them
            x += bias * attn.sum(-1, keepdims=True) if dropout_is_active(self.attn_drop) else bias
        x = self.proj(x.reshape(batch, dim))[:, None]
        return self.proj_drop(x, rngs=rngs)

    def weights(
        self, x: Float[Array, "batch tokens dim"], size: Size | None = None
    ) -> Float[Array, "batch heads 1 tokens"]:
        """How much the first token attends to each, in float32 or wider."""
        return self._softmax(x, size)[:, :, None]

    def _softmax(self, x: Float[Array, "batch tokens dim"], size: Size | None) -> Float[Array, "batch heads tokens"]:
        batch, _, dim = x.shape
        q = self.wq(x[:, 0]).reshape(batch, self.num_heads, dim // self.num_heads)
        q = self.einsum("chd,bhd->bhc", self._per_head(self.wk, x.dtype), q) * self.scale
        return softmax(self.einsum("bhc,bnc->bhn", q.astype(x.dtype), x), size)

    def _per_head(self, linear: Linear, dtype) -> Float[Array, "dim heads width"]:
        """The kernel of a projection, cut into those of the heads."""
        kernel = linear.kernel[...].astype(dtype)
        return kernel.reshape(kernel.shape[0], self.num_heads, -1)
