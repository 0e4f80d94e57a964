"""Transformer blocks of one branch, cross-attention between branches, and the stage that joins them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from crossvit_jax.attention import Attention, CrossAttention, SeparableAttention, SpatialReductionAttention
from crossvit_jax.config import Branch, CrossViTConfig, Reduction, sr_ratio_of
from crossvit_jax.kernels.layers import tokens_last
from crossvit_jax.layers import GELU, LayerNorm, Linear, Sequential
from crossvit_jax.reduce import Size, merge_tokens, prune


class Mlp(nnx.Module):
    """Two linear layers with a GELU between (timm `Mlp`)."""

    def __init__(
        self, dim: int, hidden_dim: int, *, drop: float = 0.0, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs
    ):
        kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.fc1 = Linear(dim, hidden_dim, **kwargs)
        self.act = GELU()
        self.drop1 = nnx.Dropout(drop)
        self.fc2 = Linear(hidden_dim, dim, **kwargs)
        self.drop2 = nnx.Dropout(drop)

    def __call__(
        self, x: Float[Array, "batch tokens dim"], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "batch tokens dim"]:
        x = self.drop1(self.act(self.fc1(x)), rngs=rngs)
        return self.drop2(self.fc2(x), rngs=rngs)


class DropPath(nnx.Module):
    """Stochastic depth: drops the residual branch of whole samples, and scales the others by 1 / (1 - rate)."""

    def __init__(self, rate: float = 0.0):
        self.rate = rate
        self.deterministic = False

    def set_view(self, deterministic: bool | None = None, **kwargs) -> dict:
        """Lets `nnx.view(model, deterministic=...)` reach this module as it does `nnx.Dropout`."""
        if deterministic is not None:
            self.deterministic = deterministic
        return kwargs

    def __call__(
        self, x: Float[Array, " batch *shape"], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, " batch *shape"]:
        if self.rate == 0.0 or self.deterministic:
            return x
        keep = 1.0 - self.rate
        mask = jax.random.bernoulli(rngs.dropout(), keep, (x.shape[0],) + (1,) * (x.ndim - 1))
        return jnp.where(mask, x / keep, 0)


class Block(nnx.Module):
    """Pre-norm transformer block: self-attention, then MLP (timm `Block`)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        head_dim: int | None = None,
        attention: str = "full",
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.norm1 = LayerNorm(dim, **kwargs)
        of_attention = {"qkv_bias": qkv_bias, "attn_drop": attn_drop, "proj_drop": proj_drop, **kwargs}
        if (sr_ratio := sr_ratio_of(attention)) > 1:
            self.attn = SpatialReductionAttention(dim, num_heads, sr_ratio, **of_attention)
        elif attention == "separable":
            self.attn = SeparableAttention(dim, **of_attention)
        else:
            self.attn = Attention(dim, num_heads, head_dim=head_dim, **of_attention)
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = LayerNorm(dim, **kwargs)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **kwargs)
        self.drop_path2 = DropPath(drop_path)
        self.set_attention("xla")

    def set_wide(self, enable: bool) -> None:
        """See `CrossViT.set_fp32_residual`."""
        for layer in (self.attn.proj, self.mlp.fc2):
            layer.set_wide(enable)

    def set_attention(self, implementation: str) -> None:
        """See `CrossViT.set_attention`."""
        if isinstance(self.attn, Attention):
            self.attn.implementation = implementation
        self.tokens_last = implementation == "tpu"
        for layer in (self.attn.proj, self.mlp.fc1, self.mlp.fc2):
            layer.set_tokens_last(self.tokens_last)

    def __call__(
        self,
        x: Float[Array, "batch tokens dim"],
        size: Size | None = None,
        grid: tuple[int, int] | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "batch tokens dim"]:
        """One token for each that is given; `size` is as in `Attention`, `grid` as in `SpatialReductionAttention`."""
        # keys of squares have no sizes: such a branch keeps all of its tokens
        of_patches = {"grid": grid} if isinstance(self.attn, SpatialReductionAttention) else {"size": size}
        x = self._plus(x, self.drop_path1(self.attn(self.norm1(x), **of_patches, rngs=rngs), rngs=rngs))
        return self._plus(x, self.drop_path2(self.mlp(self.norm2(x), rngs=rngs), rngs=rngs))

    def weights(
        self, x: Float[Array, "batch tokens dim"], grid: tuple[int, int]
    ) -> Float[Array, "batch heads tokens tokens"]:
        """How much each token attends to each, see `Attention.weights`."""
        of_patches = [grid] if isinstance(self.attn, SpatialReductionAttention) else []
        return self.attn.weights(self.norm1(x), *of_patches)

    def reduce(
        self,
        x: Float[Array, "batch tokens dim"],
        size: Size | None,
        reduction: Reduction,
        branch: int,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "batch fewer dim"], Float[Array, "batch fewer"] | None]:
        """The same with fewer tokens after the attention, and their sizes."""
        q, k, v = self.attn.per_head(self.norm1(x))
        x = self._plus(x, self.drop_path1(self.attn.attend(q, k, v, size, rngs=rngs), rngs=rngs))
        if reduction.kind == "merge":
            x, size = merge_tokens(x, size, k, reduction.amounts[branch])
        else:
            x, size = prune(reduction, branch, x, size, self.attn.class_weights(q, k, size))
        return self._plus(x, self.drop_path2(self.mlp(self.norm2(x), rngs=rngs), rngs=rngs)), size

    def _plus(self, x: Array, residual: Array) -> Array:
        return x + (tokens_last(residual) if self.tokens_last else residual)


class CrossAttentionBlock(nnx.Module):
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
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.norm1 = LayerNorm(dim, **kwargs)
        self.attn = CrossAttention(
            dim, num_heads, qkv_bias=qkv_bias, attn_drop=attn_drop, proj_drop=proj_drop, **kwargs
        )
        self.drop_path = DropPath(drop_path)

    def __call__(
        self,
        x: Float[Array, "batch tokens dim"],
        size: Size | None = None,
        token: Float[Array, "batch 1 dim"] | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "batch 1 dim"]:
        """The first token after it attended over all; `token` is that token, where it need not be cut out of x."""
        token = x[:, :1] if token is None else token
        return token + self.drop_path(self.attn(self.norm1(x), size, rngs=rngs), rngs=rngs)


class MultiScaleBlock(nnx.Module):
    """A stage: every branch runs its blocks, then the class tokens cross over (paper figure 3).

    Branch i's class token is projected to the width of the next branch in the ring (`projs`), attends over the patch
    tokens there (`fusion`), and is projected back (`revert_projs`).

    With `reduce_tokens` a branch may come out with fewer tokens. `sizes` are the patches that each of them stands for,
    see `crossvit_jax.reduce`: of each branch an array (batch, tokens), or None while all are 1.

    Args:
        config: of the model.
        drop_path: the stage's rates, see `CrossViTConfig.drop_path_rates`.
        stage: which one this is, from 0.
    """

    def __init__(
        self,
        config: CrossViTConfig,
        drop_path: Sequence[float],
        *,
        stage: int = 0,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        block_kwargs = {
            "qkv_bias": config.qkv_bias,
            "attn_drop": config.attn_drop_rate,
            "proj_drop": config.proj_drop_rate,
            **kwargs,
        }
        # each branch, and the one whose patches its class token attends over
        ring = list(zip(config.branches, (*config.branches[1:], config.branches[0]), strict=True))
        self.grad_checkpointing = False
        self.grids = config.grid_size
        self.reduction, self.is_last = config.reduction, stage == config.stages - 1
        # of each branch's blocks, those that reduce its tokens
        self.reduces = tuple(_in_stage(config, stage, branch) for branch in range(len(config.branches)))

        self.blocks = nnx.List(
            nnx.List(
                Block(
                    *(branch.embed_dim, branch.num_heads, branch.mlp_ratio),
                    head_dim=branch.head_dim,
                    attention=branch.attention,
                    drop_path=drop_path[i],
                    **block_kwargs,
                )
                for i in range(depth)
            )
            for branch, depth in zip(config.branches, config.stage_depths[stage], strict=True)
        )
        # of class tokens alone, whose norm costs nothing in float32
        real = {**kwargs, "dtype": jnp.promote_types(param_dtype, jnp.float32)}

        def projection(dim: int, out_dim: int) -> Sequential:
            return Sequential([LayerNorm(dim, **real), GELU(), Linear(dim, out_dim, **kwargs)])

        self.projs = nnx.List(projection(own.embed_dim, other.embed_dim) for own, other in ring)

        depth = config.fusion_depths[stage]

        def fusion(other: Branch) -> nnx.List | CrossAttentionBlock:
            dim, num_heads = other.embed_dim, other.all_heads
            blocks = [
                CrossAttentionBlock(dim, num_heads, drop_path=drop_path[-1], **block_kwargs)
                for _ in range(max(1, depth))
            ]
            return nnx.List(blocks) if depth else blocks[0]

        self.fusion = nnx.List(fusion(other) for _, other in ring)
        self.revert_projs = nnx.List(projection(other.embed_dim, own.embed_dim) for own, other in ring)

    def set_wide(self, enable: bool) -> None:
        """See `CrossViT.set_fp32_residual`: of what makes class tokens between the branches."""
        for *_, layer in (*self.projs, *self.revert_projs):
            layer.set_wide(enable)
        for i in range(len(self.fusion)):
            for _, block in self._fusion_blocks(i):
                block.attn.proj.set_wide(enable)

    def __call__(
        self,
        xs: list[Float[Array, "batch _ _"]],
        sizes: list[Size | None] | None = None,
        grids: Sequence[tuple[int, int]] | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[list[Float[Array, "batch _ _"]], list[Size | None]]:
        """Each branch's tokens (batch, 1 + patches, dim) after the stage, and their sizes.

        Args:
            grids: rows and columns of each branch's patches; none: those of the config.
        """
        xs, sizes = self.run_branches(xs, sizes, grids, rngs=rngs)
        class_tokens = self.fuse(xs, sizes, rngs=rngs)
        fused = _in_place(class_tokens, xs)
        if self.reduction is None or self.reduction.kind != "fusion" or self.is_last:
            return fused, sizes
        return self._keep_attended(fused, xs, sizes)

    def run_branches(
        self,
        xs: list[Float[Array, "batch _ _"]],
        sizes: list[Size | None] | None = None,
        grids: Sequence[tuple[int, int]] | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[list[Float[Array, "batch _ _"]], list[Size | None]]:
        """Every branch through its own blocks; `grids` is as in the call."""
        outs, out_sizes = [], []
        given = zip(xs, sizes or [None] * len(xs), grids or self.grids, self.blocks, strict=True)
        for i, (x, size, grid, blocks) in enumerate(given):
            for block, reduces in zip(blocks, self.reduces[i], strict=True):
                if reduces:
                    x, size = self._run_reduced(block, x, size, i, rngs)
                else:
                    x = self._run(block, x, size, rngs, grid)
            outs.append(x)
            out_sizes.append(size)
        return outs, out_sizes

    def fuse(
        self,
        xs: list[Float[Array, "batch _ _"]],
        sizes: list[Size | None] | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> list[Float[Array, "batch 1 _"]]:
        """Each branch's new class token (batch, 1, dim), after attending over the patch tokens of the next branch."""
        outs = []
        for i, revert_proj in enumerate(self.revert_projs):
            (token, x), size = self._cross(xs, i), (sizes or [None] * len(xs))[self._next(i)]
            for _, block in self._fusion_blocks(i):
                token = x = self._run(block, x, size, rngs, token)
                size = None  # after the first, it sees nothing but itself
            outs.append(revert_proj(token))
        return outs

    def _keep_attended(
        self, fused: list[Float[Array, "batch _ _"]], xs: list[Float[Array, "batch _ _"]], sizes: list[Size | None]
    ) -> tuple[list[Float[Array, "batch _ _"]], list[Size | None]]:
        """Fusion pruning: of each branch the patches that the class token which crossed over attended to most.

        Args:
            fused: the tokens to reduce, as the stage returns them.
            xs: the tokens as `fuse` had them.
        """
        fused, sizes, before = list(fused), list(sizes), list(sizes)
        for i in range(len(fused)):
            other = self._next(i)
            if self.reduction.amounts[other] != self.reduction.nothing:
                _, block = self._fusion_blocks(i)[0]
                _, x = self._cross(xs, i)
                attention = block.attn.weights(block.norm1(x), before[other])[:, :, 0]
                fused[other], sizes[other] = prune(self.reduction, other, fused[other], before[other], attention)
        return fused, sizes

    def attention_maps(
        self, xs: list[Float[Array, "batch _ _"]], grids: Sequence[tuple[int, int]] | None = None
    ) -> dict[str, Array]:
        """The weights of each attention by its path in the stage, whose inputs are given; `grids` is as in the call."""
        maps, outs = {}, []
        for i, (x, grid, blocks) in enumerate(zip(xs, grids or self.grids, self.blocks, strict=True)):
            for j, block in enumerate(blocks):
                maps[f"blocks.{i}.{j}.attn"] = block.weights(x, grid)
                x = block(x, None, grid)
            outs.append(x)
        for i in range(len(outs)):
            _, x = self._cross(outs, i)
            for path, block in self._fusion_blocks(i):
                maps[f"{path}.attn"] = block.attn.weights(block.norm1(x))
                x = block(x)
        return maps

    def _fusion_blocks(self, i: int) -> list[tuple[str, CrossAttentionBlock]]:
        """The cross-attention blocks that branch i's class token passes, with their paths in the stage."""
        fusion = self.fusion[i]
        if isinstance(fusion, CrossAttentionBlock):
            return [(f"fusion.{i}", fusion)]
        return [(f"fusion.{i}.{j}", block) for j, block in enumerate(fusion)]

    def _cross(
        self, xs: list[Float[Array, "batch _ _"]], i: int
    ) -> tuple[Float[Array, "batch 1 _"], Float[Array, "batch _ _"]]:
        """Branch i's class token, projected, and what it attends over: itself and the next branch's patch tokens."""
        other = xs[self._next(i)]
        token = self.projs[i](xs[i][:, :1]).astype(other.dtype)
        return token, _with_class_token(token, other)

    def _next(self, i: int) -> int:
        """The next branch in the ring."""
        return (i + 1) % len(self.projs)

    def _run(
        self,
        block: Block | CrossAttentionBlock,
        x: Float[Array, "batch _ _"],
        size: Size | None,
        rngs,
        grid_or_token: tuple[int, int] | Float[Array, "batch 1 _"],
    ) -> Float[Array, "batch _ _"]:
        """Applies one block; under gradient checkpointing its activations are computed again in the backward pass."""
        if not self.grad_checkpointing:
            return block(x, size, grid_or_token, rngs=rngs)
        return nnx.remat(lambda block, x, size, rngs: block(x, size, grid_or_token, rngs=rngs))(block, x, size, rngs)

    def _run_reduced(
        self, block: Block, x: Float[Array, "batch _ _"], size: Size | None, branch: int, rngs
    ) -> tuple[Float[Array, "batch _ _"], Size | None]:
        """The same for a block of a branch that reduces its tokens."""

        def run(block: Block, x: Array, size: Size | None, rngs) -> tuple[Array, Size | None]:
            return block.reduce(x, size, self.reduction, branch, rngs=rngs)

        return (nnx.remat(run) if self.grad_checkpointing else run)(block, x, size, rngs)


def _with_class_token(token: Float[Array, "batch 1 dim"], x: Float[Array, "batch tokens dim"]) -> Array:
    """The tokens with another class token. XLA chooses between old and new where it reads them; a concatenation would
    be a copy of them all."""
    is_first = np.arange(x.shape[1])[None, :, None] == 0
    return jnp.where(is_first, token, x)


def _in_place(class_tokens: list[Float[Array, "batch 1 _"]], xs: list[Float[Array, "batch _ _"]]) -> list[Array]:
    """The tokens of all branches with other class tokens, written over the old ones: nothing else is copied.

    By the barrier XLA reads all that the new class tokens are made of before it writes the first. A TPU has no use for
    that: what reads the tokens can join them there, and by its compiler's estimate a forward pass would take 9 % more.
    """

    def over_old(class_tokens: list[Array], xs: list[Array]) -> list[Array]:
        xs, class_tokens = jax.lax.optimization_barrier((xs, class_tokens))
        return [jax.lax.dynamic_update_slice(x, token, (0, 0, 0)) for token, x in zip(class_tokens, xs, strict=True)]

    def joined(class_tokens: list[Array], xs: list[Array]) -> list[Array]:
        return [_with_class_token(token, x) for token, x in zip(class_tokens, xs, strict=True)]

    class_tokens = [token.astype(x.dtype) for token, x in zip(class_tokens, xs, strict=True)]
    if not isinstance(xs[0].shape[0], int):  # a symbolic batch, under jax.export: one program for all platforms
        return joined(class_tokens, xs)
    return jax.lax.platform_dependent(class_tokens, xs, tpu=joined, default=over_old)


def _in_stage(config: CrossViTConfig, stage: int, branch: int) -> tuple[bool, ...]:
    """Which blocks of a branch in a stage reduce its tokens."""
    depths = [depths[branch] for depths in config.stage_depths]
    start, end = sum(depths[:stage]), sum(depths[: stage + 1])
    if config.reduction is None:
        return (False,) * (end - start)
    return tuple(config.reduction.blocks(branch, sum(depths))[start:end])
