"""Transformer blocks of one branch, cross-attention between branches, and the stage that joins them."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crossvit_jax.config import CrossViTConfig
from crossvit_torch.attention import Attention, CrossAttention
from crossvit_torch.layers import GELU, LayerNorm, Linear, Sequential


class Mlp(nn.Module):
    """Two linear layers with a GELU between (timm `Mlp`)."""

    def __init__(
        self, dim: int, hidden_dim: int, *, drop: float = 0.0, param_dtype: torch.dtype = torch.float32, device=None
    ):
        super().__init__()
        kwargs = {"dtype": param_dtype, "device": device}
        self.fc1 = Linear(dim, hidden_dim, **kwargs)
        self.act = GELU()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = Linear(hidden_dim, dim, **kwargs)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        x = self.drop1(self.act(self.fc1(x)))
        return self.drop2(self.fc2(x))


class DropPath(nn.Module):
    """Stochastic depth: drops the residual branch of whole samples, and scales the others by 1 / (1 - rate)."""

    def __init__(self, rate: float = 0.0):
        super().__init__()
        self.rate = rate

    def forward(self, x: Float[Tensor, " batch *shape"]) -> Float[Tensor, " batch *shape"]:
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1.0 - self.rate
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * (mask / keep)


class Block(nn.Module):
    """Pre-norm transformer block: self-attention, then MLP (timm `Block`)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        param_dtype: torch.dtype = torch.float32,
        device=None,
    ):
        super().__init__()
        kwargs = {"param_dtype": param_dtype, "device": device}
        self.norm1 = LayerNorm(dim, dtype=param_dtype, device=device)
        self.attn = Attention(dim, num_heads, qkv_bias=qkv_bias, attn_drop=attn_drop, proj_drop=proj_drop, **kwargs)
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = LayerNorm(dim, dtype=param_dtype, device=device)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **kwargs)
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class CrossAttentionBlock(nn.Module):
    """Pre-norm cross-attention of the class token; no MLP (paper figure 4)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        param_dtype: torch.dtype = torch.float32,
        device=None,
    ):
        super().__init__()
        kwargs = {"param_dtype": param_dtype, "device": device}
        self.norm1 = LayerNorm(dim, dtype=param_dtype, device=device)
        self.attn = CrossAttention(
            dim, num_heads, qkv_bias=qkv_bias, attn_drop=attn_drop, proj_drop=proj_drop, **kwargs
        )
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch 1 dim"]:
        return x[:, :1] + self.drop_path(self.attn(self.norm1(x)))


class MultiScaleBlock(nn.Module):
    """A stage: every branch runs its blocks, then the class tokens cross over (paper figure 3).

    Branch i's class token is projected to the other branch's width (`projs`), attends over its patch tokens
    (`fusion`), and is projected back (`revert_projs`).
    """

    def __init__(
        self,
        config: CrossViTConfig,
        drop_path: Sequence[float],
        *,
        param_dtype: torch.dtype = torch.float32,
        device=None,
    ):
        super().__init__()
        kwargs = {"dtype": param_dtype, "device": device}
        block_kwargs = {
            "qkv_bias": config.qkv_bias,
            "attn_drop": config.attn_drop_rate,
            "proj_drop": config.proj_drop_rate,
            "param_dtype": param_dtype,
            "device": device,
        }
        dims = list(zip(config.embed_dim, config.embed_dim[::-1], strict=True))  # (own width, the other branch's)
        self.grad_checkpointing = False

        self.blocks = nn.ModuleList(
            nn.ModuleList(
                Block(dim, num_heads, mlp_ratio, drop_path=drop_path[i], **block_kwargs) for i in range(depth)
            )
            for dim, depth, num_heads, mlp_ratio in zip(
                config.embed_dim, config.depth, config.num_heads, config.mlp_ratio, strict=True
            )
        )
        self.projs = nn.ModuleList(
            Sequential(LayerNorm(own, **kwargs), GELU(), Linear(own, other, **kwargs)) for own, other in dims
        )
        self.fusion = nn.ModuleList(
            CrossAttentionBlock(other, num_heads, drop_path=drop_path[-1], **block_kwargs)
            for (_, other), num_heads in zip(dims, config.num_heads[::-1], strict=True)
        )
        self.revert_projs = nn.ModuleList(
            Sequential(LayerNorm(other, **kwargs), GELU(), Linear(other, own, **kwargs)) for own, other in dims
        )

    def forward(self, xs: list[Float[Tensor, "batch _ _"]]) -> list[Float[Tensor, "batch _ _"]]:
        """Both branches' tokens (batch, 1 + patches, dim) after the stage."""
        xs = self.run_branches(xs)
        class_tokens = self.fuse(xs)
        return [torch.cat([token, x[:, 1:]], dim=1) for token, x in zip(class_tokens, xs, strict=True)]

    def run_branches(self, xs: list[Float[Tensor, "batch _ _"]]) -> list[Float[Tensor, "batch _ _"]]:
        """Every branch through its own blocks."""
        outs = []
        for x, blocks in zip(xs, self.blocks, strict=True):
            for block in blocks:
                x = self._run(block, x)
            outs.append(x)
        return outs

    def fuse(self, xs: list[Float[Tensor, "batch _ _"]]) -> list[Float[Tensor, "batch 1 _"]]:
        """Both branches' new class tokens (batch, 1, dim), each after attending over the other's patch tokens."""
        outs = []
        for i, (fusion, revert_proj) in enumerate(zip(self.fusion, self.revert_projs, strict=True)):
            outs.append(revert_proj(self._run(fusion, self._cross(xs, i))))
        return outs

    def attention_maps(self, xs: list[Float[Tensor, "batch _ _"]]) -> dict[str, Tensor]:
        """The weights of each attention by its path in the stage, whose inputs are given."""
        maps, outs = {}, []
        for i, (x, blocks) in enumerate(zip(xs, self.blocks, strict=True)):
            for j, block in enumerate(blocks):
                maps[f"blocks.{i}.{j}.attn"] = block.attn.weights(block.norm1(x))
                x = block(x)
            outs.append(x)
        for i, fusion in enumerate(self.fusion):
            maps[f"fusion.{i}.attn"] = fusion.attn.weights(fusion.norm1(self._cross(outs, i)))
        return maps

    def _cross(self, xs: list[Float[Tensor, "batch _ _"]], i: int) -> Float[Tensor, "batch _ _"]:
        """Branch i's class token, projected, with the patch tokens that it attends over."""
        return torch.cat([self.projs[i](xs[i][:, :1]), xs[1 - i][:, 1:]], dim=1)

    def _run(self, block: Block | CrossAttentionBlock, x: Float[Tensor, "batch _ _"]) -> Tensor:
        """Applies one block; under gradient checkpointing its activations are computed again in the backward pass."""
        if not self.grad_checkpointing:
            return block(x)
        return checkpoint(block, x, use_reentrant=False)
