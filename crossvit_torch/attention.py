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

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        *,
        attn_maps: list | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """Each token attends over all. If `attn_maps` is given, (batch, heads, tokens, tokens) is appended to it."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        # the fused kernel shows no weights
        if attn_maps is None:
            dropout = self.attn_drop.p if dropout_is_active(self.attn_drop) else 0.0
            x = functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.scale)
        else:
            attn = softmax(q @ k.transpose(-2, -1) * self.scale)
            attn_maps.append(attn)
            attn = self.attn_drop(attn).to(v.dtype)
            x = attn @ v
        x = self.proj(x.transpose(1, 2).reshape(batch, tokens, dim))
        return self.proj_drop(x)


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

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        *,
        attn_maps: list | None = None,
    ) -> Float[Tensor, "batch 1 dim"]:
        """The first token attends over all. If `attn_maps` is given, (batch, heads, 1, tokens) is appended to it.

        The plain order of computation; the Flax twin folds the key and value projections into the single query.
        """
        batch, _, dim = x.shape

        def per_head(y: Tensor) -> Tensor:
            return y.reshape(batch, -1, self.num_heads, dim // self.num_heads).transpose(1, 2)

        q, k, v = per_head(self.wq(x[:, :1])), per_head(self.wk(x)), per_head(self.wv(x))
        attn = softmax(q @ k.transpose(-2, -1) * self.scale)
        if attn_maps is not None:
            attn_maps.append(attn)
        attn = self.attn_drop(attn).to(v.dtype)

        x = (attn @ v).transpose(1, 2)
        x = self.proj(x.reshape(batch, 1, dim))
        return self.proj_drop(x)
