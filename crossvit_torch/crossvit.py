"""The whole model."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from crossvit_jax.config import CrossViTConfig, get_config
from crossvit_torch.blocks import MultiScaleBlock
from crossvit_torch.layers import Identity, LayerNorm, Linear, draw_normal
from crossvit_torch.patch_embed import PatchEmbed
from crossvit_torch.reduce import Size, mean_patch
from crossvit_torch.resize import resample_pos_embed, scale_image

Masked = tuple[Bool[Tensor, "batch _"], Float[Tensor, "1 1 _"]]  # patches, and the token in their place


class CrossViT(nn.Module):
    """CrossViT (arXiv 2103.14899): branches over patches of several sizes, joined by their class tokens.

    Args:
        config: the architecture and its options, see `get_config`.
        dtype: of the computation; default: `param_dtype`. Half precision keeps softmax, norm statistics, the head and
            the logits in float32.
        param_dtype: of the parameters.
        device: where they live.

    Attributes `num_classes`, `global_pool` and `config` tell what the model is. New models are in training mode, with
    dropout and drop path on where their rates are above 0. `eval()` turns both off.
    """

    def __init__(
        self,
        config: CrossViTConfig,
        *,
        dtype: torch.dtype | None = None,
        param_dtype: torch.dtype = torch.float32,
        device=None,
    ):
        super().__init__()
        self.config = config
        self.dtype = dtype
        kwargs = {"param_dtype": param_dtype, "device": device}

        for i, (dim, (rows, columns)) in enumerate(zip(config.embed_dim, config.grid_size, strict=True)):
            setattr(self, f"pos_embed_{i}", _token(1 + rows * columns, dim, param_dtype, device))
            setattr(self, f"cls_token_{i}", _token(1, dim, param_dtype, device))
        self.patch_embed = nn.ModuleList(
            PatchEmbed(branch.patch_size, config.in_chans, branch.embed_dim, multi_conv=config.multi_conv, **kwargs)
            for branch in config.branches
        )
        self.pos_drop = nn.Dropout(config.pos_drop_rate)
        self.blocks = nn.ModuleList(
            MultiScaleBlock(config, rates, stage=stage, **kwargs) for stage, rates in enumerate(config.drop_path_rates)
        )
        self.norm = nn.ModuleList(LayerNorm(dim, dtype=param_dtype, device=device) for dim in config.embed_dim)
        self.head_drop = nn.Dropout(config.drop_rate)
        self.reset_classifier(config.num_classes)

    @property
    def param_dtype(self) -> torch.dtype:
        """Follows `model.double()` and the like."""
        return self.cls_token_0.dtype

    @property
    def num_classes(self) -> int:
        return self.config.num_classes

    @property
    def global_pool(self) -> str:
        return self.config.global_pool

    @property
    def num_features(self) -> int:
        """Width of the pooled features of all branches together."""
        return sum(self.config.embed_dim)

    @property
    def head_hidden_size(self) -> int:
        """Width of what the head would get, see `forward_head(pre_logits=True)`: `num_features`."""
        return self.num_features

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """What `forward_intermediates` returns, see `CrossViTConfig.feature_info`."""
        return self.config.feature_info

    def forward(
        self, images: Float[Tensor, "batch channels height width"], patch_size: tuple[int, ...] | None = None
    ) -> Float[Tensor, "batch out"]:
        """Logits (batch, classes), or without classes the pooled features (batch, widths), in float32 or wider.

        Args:
            images: channels first, ImageNet-normalised. Other sizes than the configured one are brought to it, as timm
                does; that hides a mistake easily, so prefer a model of the right `image_size`.
            patch_size: pixels of the patches, one number per branch; none: those of the config. For others, the kernels
                that embed patches and the position embeddings are resized. A model that was not trained with such
                patches loses accuracy.

        Raises:
            ValueError: wrong rank, channels or dtype of the images; or a patch size that cannot be, see
                `CrossViTConfig.at_patch_size`.
        """
        with self._precision(images):
            xs, grids = self._embed(images, patch_size)
            *stages, last = self.blocks
            sizes = None
            for stage in stages:
                xs, sizes = stage(xs, sizes, grids)
            # the head pools either the class tokens or the patch tokens: the others are not computed
            xs, sizes = last.run_branches(xs, sizes, grids)
            if self.global_pool == "token":
                xs = last.fuse(xs, sizes)
            xs = self._normalise(xs)
        return self._pool(xs, sizes)

    def forward_features(
        self,
        images: Float[Tensor, "batch channels height width"],
        patch_size: tuple[int, ...] | None = None,
        *,
        own_size: bool = False,
    ) -> list[Float[Tensor, "batch _ _"]]:
        """Each branch's normalised tokens (batch, 1 + patches, dim), class token first.

        Args:
            patch_size: see the call.
            own_size: images of another size than the configured one are not brought to it: they have more patches or
                fewer, and position embeddings are resampled.

        Raises ValueError as the call, where `reduce_tokens` leaves no token for each patch, or where images at their
        own size do not divide into whole patches.
        """
        self.config.require_all_tokens("forward_features")
        with self._precision(images):
            xs, grids = self._embed(images, patch_size, own_size=own_size)
            for stage in self.blocks:
                xs, _ = stage(xs, None, grids)
            return self._normalise(xs)

    def forward_patches(
        self, images: Float[Tensor, "batch channels height width"], masked: Sequence[Masked] | None = None
    ) -> list[Float[Tensor, "batch _ _ _"]]:
        """Each branch's normalised patches as a map (batch, dim, rows, columns), for dense prediction.

        Patches never see the last stage's fusion, which only makes class tokens: it is not run, see
        `unused_by_patches`.

        Args:
            masked: of each branch the patches (batch, patches), row by row, that a token (1, 1, dim) takes the place of
                before positions are added; none: no patch.
        """
        self.config.require_all_tokens("forward_patches")
        with self._precision(images):
            xs, grids = self._embed(images, masked=masked)
            *stages, last = self.blocks
            for stage in stages:
                xs, _ = stage(xs, None, grids)
            xs, _ = last.run_branches(xs, None, grids)
            xs = self._normalise(xs)
        return [self._as_map(x[:, 1:], grid, "NCHW") for grid, x in zip(self.config.grid_size, xs, strict=True)]

    def forward_head(
        self, xs: list[Float[Tensor, "batch _ _"]], *, pre_logits: bool = False
    ) -> Float[Tensor, "batch out"]:
        """Pools the result of `forward_features`; then the mean of all heads, or with `pre_logits` no head."""
        return self._pool(xs, None, pre_logits=pre_logits)

    def _pool(
        self, xs: list[Float[Tensor, "batch _ _"]], sizes: list[Size | None] | None, *, pre_logits: bool = False
    ) -> Float[Tensor, "batch out"]:
        """See `forward_head`; sizes are those of `MultiScaleBlock`."""
        real = torch.promote_types(self.param_dtype, torch.float32)
        pooled = [
            mean_patch(x.to(real), size) if self.global_pool == "avg" else x[:, 0].to(real)
            for x, size in zip(xs, sizes or [None] * len(xs), strict=True)
        ]
        pooled = [self.head_drop(x) for x in pooled]
        if pre_logits or self.num_classes == 0:
            return torch.cat(pooled, dim=1)
        return sum(head(x) for head, x in zip(self.head, pooled, strict=True)) / len(pooled)

    def forward_intermediates(
        self,
        images: Float[Tensor, "batch channels height width"],
        indices: int | Sequence[int] | None = None,
        *,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        patch_size: tuple[int, ...] | None = None,
    ) -> tuple[list[Tensor], list[Tensor]] | list[Tensor]:
        """Patch features of all branches after any stage (timm `forward_intermediates`).

        Args:
            indices: with S stages, 0 to S-1 are branch 0 after each stage, S to 2S-1 branch 1, and so on; negative ones
                count from the end, an int n takes the last n, None takes all.
            norm: apply the branch's final norm to them.
            stop_early: leave out the stages after the last one asked for.
            output_fmt: "NCHW" or "NHWC" for maps of (rows, columns) patches, "NLC" for tokens (batch, patches, dim).
            intermediates_only: return only the list of intermediates.
            patch_size: see the call.

        Returns:
            (the list that `forward_features` returns, intermediates in the order of their indices), or the latter only.

        Raises:
            ValueError: an index out of range, an unknown format, or as `forward_features`.
        """
        self.config.require_all_tokens("forward_intermediates")
        wanted = self.config.feature_indices(indices)
        if output_fmt not in ("NCHW", "NHWC", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW', 'NHWC' or 'NLC'; got {output_fmt!r}")
        stages = len(self.blocks)
        last = max(index % stages for index in wanted)
        taken = {}
        with self._precision(images):
            xs, grids = self._embed(images, patch_size)
            for i, stage in enumerate(self.blocks):
                if stop_early and i > last:
                    break
                xs, _ = stage(xs, None, grids)
                for branch, y in enumerate(self._normalise(xs) if norm else xs):
                    taken[branch * stages + i] = self._as_map(y[:, 1:], grids[branch], output_fmt).contiguous()
            intermediates = [taken[index] for index in wanted]
            return intermediates if intermediates_only else (self._normalise(xs), intermediates)

    def attention_maps(
        self, images: Float[Tensor, "batch channels height width"], patch_size: tuple[int, ...] | None = None
    ) -> dict[str, Tensor]:
        """The attention weights of every attention by its path, in float32 or wider.

        (batch, heads, tokens, tokens) for self-attention, such as "blocks.0.blocks.1.2.attn", and (batch, heads, 1,
        tokens) for cross-attention, such as "blocks.0.fusion.1.attn", or "blocks.0.fusion.1.0.attn" where fusions have
        a depth. Token 0 is the class token, the others are the patches row by row, whose sizes are `patch_size`, see
        the call. Call it in evaluation mode; other calls do not pay for it.

        Raises ValueError as `forward_features`.
        """
        self.config.require_all_tokens("attention_maps")
        maps = {}
        with self._precision(images):
            xs, grids = self._embed(images, patch_size)
            for i, stage in enumerate(self.blocks):
                maps |= {f"blocks.{i}.{path}": weights for path, weights in stage.attention_maps(xs, grids).items()}
                xs, _ = stage(xs, None, grids)
        return maps

    def get_classifier(self) -> nn.ModuleList:
        """The heads, one per branch."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, freshly initialised head for `num_classes` (0: none), and optionally another pooling."""
        self.config = dataclasses.replace(
            self.config, num_classes=num_classes, global_pool=global_pool or self.global_pool
        )
        self.head = nn.ModuleList(
            Linear(dim, num_classes, dtype=self.param_dtype, device=self.cls_token_0.device)
            if num_classes > 0
            else Identity()
            for dim in self.config.embed_dim
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades memory for time in training: each block's activations are computed again in the backward pass."""
        for stage in self.blocks:
            stage.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay leaves out, besides biases and norms (timm `no_weight_decay`)."""
        return {f"{name}_{i}" for name in ("cls_token", "pos_embed") for i in range(len(self.patch_embed))}

    def is_head(self, name: str) -> bool:
        """Whether a parameter, by its dotted name, belongs to the heads."""
        return name.split(".")[0] == "head"

    def unused_by_patches(self, name: str) -> bool:
        """Whether a parameter, by its dotted name, has no part in `forward_patches`: the last stage's fusion.

        Its gradient is zero there; weight decay, which asks for no gradient, would still shrink it.
        """
        part, *path = name.split(".")
        return part == "blocks" and int(path[0]) == len(self.blocks) - 1 and path[1] != "blocks"

    def layer_of(self, name: str) -> int:
        """The layer that a parameter belongs to, by its dotted name, from 0 at the image to the last at the heads.

        Embeddings are layer 0. In each stage, block i of every branch is a layer, and the fusion with its projections
        is one more. Final norms and heads are the last layer.
        """
        depths = [max(depths) for depths in self.config.stage_depths]
        part, *path = name.split(".")
        if part == "blocks":
            stage = int(path[0])
            below = sum(depths[:stage]) + stage
            return 1 + below + (int(path[3]) if path[1] == "blocks" else depths[stage])
        return 1 + sum(depths) + len(depths) if part in ("norm", "head") else 0

    def _embed(
        self,
        images: Tensor,
        patch_size: tuple[int, ...] | None = None,
        masked: Sequence[Masked] | None = None,
        own_size: bool = False,
    ) -> tuple[list[Float[Tensor, "batch _ _"]], tuple[tuple[int, int], ...]]:
        """Each branch's class and patch tokens with position embeddings, and the grids of its patches."""
        if images.ndim != 4 or images.shape[1] != self.config.in_chans:
            raise ValueError(
                f"images must have shape (batch, {self.config.in_chans}, height, width); got {tuple(images.shape)}"
            )
        if not images.is_floating_point():
            raise ValueError(f"images must be normalised floats; got dtype {images.dtype}")
        images = images.to(self.param_dtype)
        config, xs = self._at(patch_size), []
        if own_size:
            config = config.replace(image_size=tuple(images.shape[2:]))
        for i, (patch_embed, size) in enumerate(zip(self.patch_embed, config.branch_image_size, strict=True)):
            x = patch_embed(scale_image(images, size, config.crop_scale), config.patch_size[i])
            if masked is not None:
                mask, token = masked[i]
                x = torch.where(mask[..., None], token.to(x.dtype), x)
            cls_token = getattr(self, f"cls_token_{i}").to(x.dtype)
            x = torch.cat([cls_token.expand(x.shape[0], -1, -1), x], dim=1)
            pos_embed = getattr(self, f"pos_embed_{i}")
            if config.grid_size[i] != self.config.grid_size[i]:
                pos_embed = resample_pos_embed(pos_embed, self.config.grid_size[i], config.grid_size[i])
            x = x + pos_embed.to(x.dtype)
            xs.append(self.pos_drop(x))
        return xs, config.grid_size

    def _normalise(self, xs: list[Float[Tensor, "batch _ _"]]) -> list[Float[Tensor, "batch _ _"]]:
        """Each branch's final norm."""
        return [norm(x) for norm, x in zip(self.norm, xs, strict=True)]

    def _at(self, patch_size: tuple[int, ...] | None) -> CrossViTConfig:
        """The settings at a patch size."""
        return self.config if patch_size is None else self.config.at_patch_size(patch_size)

    def _as_map(self, x: Float[Tensor, "batch patches dim"], grid: tuple[int, int], output_fmt: str) -> Tensor:
        """Patch tokens in the format asked for."""
        if output_fmt == "NLC":
            return x
        x = x.reshape(x.shape[0], *grid, x.shape[2])
        return x if output_fmt == "NHWC" else x.permute(0, 3, 1, 2)

    def _precision(self, images: Tensor) -> torch.autocast:
        """Computes in `dtype` what is safe in it; torch keeps the list."""
        mixed = self.dtype not in (None, self.param_dtype)
        return torch.autocast(images.device.type, self.dtype if mixed else torch.bfloat16, enabled=mixed)


def _token(tokens: int, dim: int, param_dtype: torch.dtype, device) -> nn.Parameter:
    return nn.Parameter(draw_normal(torch.empty(1, tokens, dim, dtype=param_dtype, device=device), 0.02))


def create_model(
    name: str, *, dtype: torch.dtype | None = None, param_dtype: torch.dtype = torch.float32, device=None, **overrides
) -> CrossViT:
    """A freshly initialised CrossViT.

    Args:
        name: a variant by its short, timm or IBM name, see `list_variants`.
        dtype, param_dtype, device: see `CrossViT`.
        **overrides: settings of `CrossViTConfig`: num_classes, in_chans, image_size, drop_path_rate, …

    Raises:
        ValueError, TypeError: see `get_config`.
    """
    return CrossViT(get_config(name, **overrides), dtype=dtype, param_dtype=param_dtype, device=device)
