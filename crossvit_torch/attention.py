"""Self-attention, and cross-attention with one query."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from crossvit_torch.layers import Conv, LayerNorm, Linear, dropout_is_active
from crossvit_torch.reduce import Size, log_size


def softmax(
    scores: Float[Tensor, "batch heads queries tokens"], size: Size | None = None
) -> Float[Tensor, "batch heads queries tokens"]:
    """Softmax over the last axis, in float32 or wider; returned in that precision. Tokens count by their size."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if size is not None:
        scores = scores + log_size(size)[:, None, None]
    return scores.softmax(dim=-1)


class Attention(nn.Module):
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
        param_dtype: torch.dtype = torch.float32,
        device=None,
    ):
        super().__init__()
        kwargs = {"dtype": param_dtype, "device": device}
        self.num_heads = num_heads
        self.head_dim = head_dim or dim // num_heads
        self.scale = self.head_dim**-0.5
        width = num_heads * self.head_dim
        self.qkv = Linear(dim, 3 * width, bias=qkv_bias, **kwargs)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = Linear(width, dim, **kwargs)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], size: Size | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        """Each token attends over all.

        Args:
            size: the patches that each token stands for, see `crossvit_torch.reduce`; None: one each.
        """
        return self.attend(*self.per_head(x), size)

    def attend(
        self,
        q: Float[Tensor, "batch heads tokens width"],
        k: Float[Tensor, "batch heads keys width"],
        v: Float[Tensor, "batch heads keys width"],
        size: Size | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """The same for what `per_head` returns."""
        dropout = self.attn_drop.p if dropout_is_active(self.attn_drop) else 0.0
        bias = None if size is None else log_size(size)[:, None, None].to(q.dtype)
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=self.scale)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))

    def weights(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch heads tokens tokens"]:
        """How much each token (last axis but one) attends to each, in float32 or wider."""
        q, k, _ = self.per_head(x)
        return self._softmax(q, k)

    def class_weights(
        self,
        q: Float[Tensor, "batch heads tokens width"],
        k: Float[Tensor, "batch heads tokens width"],
        size: Size | None = None,
    ) -> Float[Tensor, "batch heads tokens"]:
        """How much the first token attends to each, of what `per_head` returns, in float32 or wider."""
        return self._softmax(q[:, :, :1], k, size)[:, :, 0]

    def per_head(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "3 batch heads tokens width"]:
        """Queries, keys and values."""
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim)
        return qkv.permute(2, 0, 3, 1, 4)

    def _softmax(self, q: Tensor, k: Tensor, size: Size | None = None) -> Float[Tensor, "batch heads queries tokens"]:
        return softmax(q @ k.transpose(-2, -1) * self.scale, size)


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
        param_dtype: torch.dtype = torch.float32,
        device=None,
    ):
        nn.Module.__init__(self)
        kwargs = {"dtype": param_dtype, "device": device}
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.sr_ratio = sr_ratio
        self.q = Linear(dim, dim, bias=qkv_bias, **kwargs)
        self.kv = Linear(dim, 2 * dim, bias=qkv_bias, **kwargs)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = Linear(dim, dim, **kwargs)
        self.proj_drop = nn.Dropout(proj_drop)
        self.sr = Conv(dim, dim, sr_ratio, stride=sr_ratio, **kwargs)
        self.norm = LayerNorm(dim, **kwargs)

    def forward(self, x: Float[Tensor, "batch tokens dim"], grid: tuple[int, int]) -> Float[Tensor, "batch tokens dim"]:
        """Each token attends over the class token and the squares.

        Args:
            grid: rows and columns of patches, which `sr_ratio` divides.
        """
        return self.attend(*self.per_head(x, grid))

    def weights(
        self, x: Float[Tensor, "batch tokens dim"], grid: tuple[int, int]
    ) -> Float[Tensor, "batch heads tokens tokens"]:
        """How much each token (last axis but one) attends to each, in float32 or wider: the patches of a square share
        its weight evenly."""
        q, k, _ = self.per_head(x, grid)
        attn, (rows, columns), side = self._softmax(q, k), grid, self.sr_ratio
        squares = attn[..., 1:].reshape(*attn.shape[:3], rows // side, columns // side) / side**2
        patches = squares.repeat_interleave(side, dim=3).repeat_interleave(side, dim=4)
        return torch.cat([attn[..., :1], patches.flatten(3)], dim=-1)

    def per_head(
        self, x: Float[Tensor, "batch tokens dim"], grid: tuple[int, int]
    ) -> list[Float[Tensor, "batch heads _ width"]]:
        """Queries of all tokens, and the keys and values of the class token and the squares, row by row."""
        batch, tokens, dim = x.shape
        squares = self.sr(x[:, 1:].transpose(1, 2).reshape(batch, dim, *grid))
        reduced = torch.cat([x[:, :1], self.norm(squares.flatten(2).transpose(1, 2))], dim=1)
        kv = self.kv(reduced).reshape(batch, reduced.shape[1], 2, self.num_heads, self.head_dim)
        q = self.q(x).reshape(batch, tokens, self.num_heads, self.head_dim)
        return [q.transpose(1, 2), *kv.permute(2, 0, 3, 1, 4)]


class SeparableAttention(nn.Module):
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
        param_dtype: torch.dtype = torch.float32,
        device=None,
    ):
        super().__init__()
        kwargs = {"dtype": param_dtype, "device": device}
        self.qkv = Linear(dim, 1 + 2 * dim, bias=qkv_bias, **kwargs)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = Linear(dim, dim, **kwargs)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], size: Size | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        """What each token makes of the context; `size` is as in `Attention`."""
        score, k, v = self.qkv(x).split((1, x.shape[-1], x.shape[-1]), dim=-1)
        attn = self.attn_drop(softmax(score.transpose(1, 2)[:, None], size)[:, 0]).to(k.dtype)
        return self.proj_drop(self.proj(v.relu() * (attn @ k)))

    def weights(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch 1 tokens tokens"]:
        """How much each token (last axis but one) attends to each, which is the same for all, in float32 or wider."""
        score = self.qkv(x)[:, :, :1].transpose(1, 2)[:, None]
        return softmax(score).expand(-1, -1, x.shape[1], -1)


class CrossAttention(nn.Module):
    """The class token attends over all tokens: one query, so cost is linear in their number (paper §3.3, eq. 4)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        param_dtype: torch.dtype = torch.float32,
        device=None,
    ):
        super().__init__()
        kwargs = {"dtype": param_dtype, "device": device}
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.wq = Linear(dim, dim, bias=qkv_bias, **kwargs)
        self.wk = Linear(dim, dim, bias=qkv_bias, **kwargs)
        self.wv = Linear(dim, dim, bias=qkv_bias, **kwargs)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = Linear(dim, dim, **kwargs)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Float[Tensor, "batch tokens dim"], size: Size | None = None) -> Float[Tensor, "batch 1 dim"]:
        """The first token attends over all; `size` is as in `Attention`.

        The plain order of computation; the Flax twin folds the key and value projections into the single query.
        """
        batch, _, dim = x.shape
        v = self._per_head(self.wv(x))
        attn = self.attn_drop(self.weights(x, size)).to(v.dtype)
        x = (attn @ v).transpose(1, 2)
        x = self.proj(x.reshape(batch, 1, dim))
        return self.proj_drop(x)

    def weights(
        self, x: Float[Tensor, "batch tokens dim"], size: Size | None = None
    ) -> Float[Tensor, "batch heads 1 tokens"]:
        """How much the first token attends to each, in float32 or wider."""
        q, k = self._per_head(self.wq(x[:, :1])), self._per_head(self.wk(x))
        return softmax(q @ k.transpose(-2, -1) * self.scale, size)

    def _per_head(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch heads tokens width"]:
        batch, tokens, dim = x.shape
        return x.reshape(batch, tokens, self.num_heads, dim // self.num_heads).transpose(1, 2)
