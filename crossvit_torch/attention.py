"""Self-attention, and cross-attention with one query."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from crossvit_torch.layers import Linear, dropout_is_active


def softmax(scores: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Softmax over the last axis, in float32 or wider; returned in that precision."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(dim=-1)


class Attention(nn.Module):
    """Multi-head self-attention (timm `Attention`)."""

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
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **kwargs)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = Linear(dim, dim, **kwargs)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        """Each token attends over all."""
        q, k, v = self._per_head(x)
        dropout = self.attn_drop.p if dropout_is_active(self.attn_drop) else 0.0
        out = functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.scale)
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(x.shape)))

    def weights(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch heads tokens tokens"]:
        """How much each token (last axis but one) attends to each, in float32 or wider."""
        q, k, _ = self._per_head(x)
        return softmax(q @ k.transpose(-2, -1) * self.scale)

    def _per_head(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "3 batch heads tokens width"]:
        """Queries, keys and values."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        return qkv.permute(2, 0, 3, 1, 4)


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

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch 1 dim"]:
        """The first token attends over all.

        The plain order of computation; the Flax twin folds the key and value projections into the single query.
        """
        batch, _, dim = x.shape
        v = self._per_head(self.wv(x))
        attn = self.attn_drop(self.weights(x)).to(v.dtype)
        x = (attn @ v).transpose(1, 2)
        x = self.proj(x.reshape(batch, 1, dim))
        return self.proj_drop(x)

    def weights(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch heads 1 tokens"]:
        """How much the first token attends to each, in float32 or wider."""
        q, k = self._per_head(self.wq(x[:, :1])), self._per_head(self.wk(x))
        return softmax(q @ k.transpose(-2, -1) * self.scale)

    def _per_head(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch heads tokens width"]:
        batch, tokens, dim = x.shape
        return x.reshape(batch, tokens, self.num_heads, dim // self.num_heads).transpose(1, 2)
