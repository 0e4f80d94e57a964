"""The whole model."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from crossvit_jax.attention import Attention, CrossAttention
from crossvit_jax.blocks import Block, MultiScaleBlock
from crossvit_jax.config import CrossViTConfig, get_config
from crossvit_jax.kernels.attention import fastest_implementation
from crossvit_jax.layers import GELU, Conv, Identity, LayerNorm, Linear
from crossvit_jax.patch_embed import PatchEmbed
from crossvit_jax.reduce import Size, mean_patch
from crossvit_jax.resize import resample_pos_embed, scale_image

Masked = tuple[Bool[Array, "batch _"], Float[Array, "1 1 _"]]  # patches, and the token in their place


class CrossViT(nnx.Module):
    """CrossViT (arXiv 2103.14899): branches over patches of several sizes, joined by their class tokens.

    Args:
        config: the architecture and its options, see `get_config`.
        dtype: of the computation; default: `param_dtype`. Half precision keeps softmax, norm statistics, the head and
            the logits in float32.
        param_dtype: of the parameters.
        rngs: draws the initial parameters; used in no other way.

    Attributes `num_classes`, `global_pool` and `config` tell what the model is. New models are in training mode; there,
    if any dropout or drop-path rate is above 0, calls need `rngs=nnx.Rngs(dropout=key)`. `eval()` turns both off.
    """

    def __init__(self, config: CrossViTConfig, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.dtype = jnp.dtype(param_dtype if dtype is None else dtype)
        self.residual_dtype = self.dtype
        self.param_dtype = jnp.dtype(param_dtype)
        kwargs = {"dtype": self.dtype, "param_dtype": self.param_dtype, "rngs": rngs}

        for i, (dim, (rows, columns)) in enumerate(zip(config.embed_dim, config.grid_size, strict=True)):
            setattr(self, f"pos_embed_{i}", _token(1 + rows * columns, dim, self.param_dtype, rngs))
            setattr(self, f"cls_token_{i}", _token(1, dim, self.param_dtype, rngs))
        self.patch_embed = nnx.List(
            PatchEmbed(branch.patch_size, config.in_chans, branch.embed_dim, multi_conv=config.multi_conv, **kwargs)
            for branch in config.branches
        )
        self.pos_drop = nnx.Dropout(config.pos_drop_rate)
        self.blocks = nnx.List(
            MultiScaleBlock(config, rates, stage=stage, **kwargs) for stage, rates in enumerate(config.drop_path_rates)
        )
        self.norm = nnx.List(LayerNorm(dim, **{**kwargs, "dtype": self._real}) for dim in config.embed_dim)
        self.head_drop = nnx.Dropout(config.drop_rate)
        self.reset_classifier(config.num_classes, rngs=rngs)

    @property
    def _real(self):
        """The precision of what is pooled and of the logits: float32 or wider."""
        return jnp.promote_types(self.param_dtype, jnp.float32)

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

    def __call__(
        self,
        images: Float[Array, "batch height width channels"],
        patch_size: tuple[int, ...] | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "batch out"]:
        """Logits (batch, classes), or without classes the pooled features (batch, widths), in float32 or wider.

        Args:
            images: channels last, ImageNet-normalised. Other sizes than the configured one are brought to it, as timm
                does; that hides a mistake easily, so prefer a model of the right `image_size`.
            patch_size: pixels of the patches, one number per branch; none: those of the config. For others, the kernels
                that embed patches and the position embeddings are resized. A model that was not trained with such
                patches loses accuracy.
            rngs: stream `dropout`, for training mode.

        Raises:
            ValueError: wrong rank, channels or dtype of the images; training mode without `rngs`; or a patch size that
                cannot be, see `CrossViTConfig.at_patch_size`.
        """
        xs, grids = self._embed(images, rngs, patch_size)
        *stages, last = self.blocks
        sizes = None
        for stage in stages:
            xs, sizes = stage(xs, sizes, grids, rngs=rngs)
        # the head pools either the class tokens or the patch tokens: the others are not computed
        xs, sizes = last.run_branches(xs, sizes, grids, rngs=rngs)
        if self.global_pool == "token":
            xs = last.fuse(xs, sizes, rngs=rngs)
        return self._pool(self._normalise(xs), sizes, rngs=rngs)

    def forward_features(
        self,
        images: Float[Array, "batch height width channels"],
        patch_size: tuple[int, ...] | None = None,
        *,
        own_size: bool = False,
        rngs: nnx.Rngs | None = None,
    ) -> list[Float[Array, "batch _ _"]]:
        """Each branch's normalised tokens (batch, 1 + patches, dim), class token first.

        Args:
            patch_size: see the call.
            own_size: images of another size than the configured one are not brought to it: they have more patches or
                fewer, and position embeddings are resampled.

        Raises ValueError as the call, where `reduce_tokens` leaves no token for each patch, or where images at their
        own size do not divide into whole patches.
        """
        self.config.require_all_tokens("forward_features")
        xs, grids = self._embed(images, rngs, patch_size, own_size=own_size)
        for stage in self.blocks:
            xs, _ = stage(xs, None, grids, rngs=rngs)
        return self._features(xs)

    def forward_patches(
        self,
        images: Float[Array, "batch height width channels"],
        masked: Sequence[Masked] | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> list[Float[Array, "batch _ _ _"]]:
        """Each branch's normalised patches as a map (batch, rows, columns, dim), for dense prediction.

        Patches never see the last stage's fusion, which only makes class tokens: it is not run, see
        `unused_by_patches`.

        Args:
            masked: of each branch the patches (batch, patches), row by row, that a token (1, 1, dim) takes the place of
                before positions are added; none: no patch.
        """
        self.config.require_all_tokens("forward_patches")
        xs, grids = self._embed(images, rngs, masked=masked)
        *stages, last = self.blocks
        for stage in stages:
            xs, _ = stage(xs, None, grids, rngs=rngs)
        xs, _ = last.run_branches(xs, None, grids, rngs=rngs)
        xs = self._features(xs)
        return [self._as_map(x[:, 1:], grid, "NHWC") for grid, x in zip(self.config.grid_size, xs, strict=True)]

    def forward_head(
        self, xs: list[Float[Array, "batch _ _"]], *, pre_logits: bool = False, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "batch out"]:
        """Pools the result of `forward_features`; then the mean of all heads, or with `pre_logits` no head."""
        return self._pool(xs, None, pre_logits=pre_logits, rngs=rngs)

    def _pool(
        self,
        xs: list[Float[Array, "batch _ _"]],
        sizes: list[Size | None] | None,
        *,
        pre_logits: bool = False,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "batch out"]:
        """See `forward_head`; sizes are those of `MultiScaleBlock`."""
        pooled = [
            mean_patch(x.astype(self._real), size) if self.global_pool == "avg" else x[:, 0].astype(self._real)
            for x, size in zip(xs, sizes or [None] * len(xs), strict=True)
        ]
        pooled = [self.head_drop(x, rngs=rngs) for x in pooled]
        if pre_logits or self.num_classes == 0:
            return jnp.concatenate(pooled, axis=1)
        return sum(head(x) for head, x in zip(self.head, pooled, strict=True)) / len(pooled)

    def forward_intermediates(
        self,
        images: Float[Array, "batch height width channels"],
        indices: int | Sequence[int] | None = None,
        *,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NHWC",
        intermediates_only: bool = False,
        patch_size: tuple[int, ...] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[list[Array], list[Array]] | list[Array]:
        """Patch features of all branches after any stage (timm `forward_intermediates`).

        Args:
            indices: with S stages, 0 to S-1 are branch 0 after each stage, S to 2S-1 branch 1, and so on; negative ones
                count from the end, an int n takes the last n, None takes all.
            norm: apply the branch's final norm to them.
            stop_early: leave out the stages after the last one asked for.
            output_fmt: "NHWC" or "NCHW" for maps of (rows, columns) patches, "NLC" for tokens (batch, patches, dim).
            intermediates_only: return only the list of intermediates.
            patch_size: see the call.

        Returns:
            (the list that `forward_features` returns, intermediates in the order of their indices), or the latter only.

        Raises:
            ValueError: an index out of range, an unknown format, or as `forward_features`.
        """
        self.config.require_all_tokens("forward_intermediates")
        wanted = self.config.feature_indices(indices)
        if output_fmt not in ("NHWC", "NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NHWC', 'NCHW' or 'NLC'; got {output_fmt!r}")
        stages = len(self.blocks)
        last = max(index % stages for index in wanted)
        taken = {}
        xs, grids = self._embed(images, rngs, patch_size)
        for i, stage in enumerate(self.blocks):
            if stop_early and i > last:
                break
            xs, _ = stage(xs, None, grids, rngs=rngs)
            for branch, y in enumerate(self._features(xs) if norm else xs):
                taken[branch * stages + i] = self._as_map(y[:, 1:], grids[branch], output_fmt)
        intermediates = [taken[index] for index in wanted]
        return intermediates if intermediates_only else (self._features(xs), intermediates)

    def attention_maps(
        self, images: Float[Array, "batch height width channels"], patch_size: tuple[int, ...] | None = None
    ) -> dict[str, Array]:
        """The attention weights of every attention by its path, in float32 or wider.

        (batch, heads, tokens, tokens) for self-attention, such as "blocks.0.blocks.1.2.attn", and (batch, heads, 1,
        tokens) for cross-attention, such as "blocks.0.fusion.1.attn", or "blocks.0.fusion.1.0.attn" where fusions have
        a depth. Token 0 is the class token, the others are the patches row by row, whose sizes are `patch_size`, see
        the call. Call it in evaluation mode; other calls do not pay for it.

        Raises ValueError as `forward_features`.
        """
        self.config.require_all_tokens("attention_maps")
        maps = {}
        xs, grids = self._embed(images, None, patch_size)
        for i, stage in enumerate(self.blocks):
            maps |= {f"blocks.{i}.{path}": weights for path, weights in stage.attention_maps(xs, grids).items()}
            xs, _ = stage(xs, None, grids)
        return maps

    def get_classifier(self) -> nnx.List:
        """The heads, one per branch."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, *, rngs: nnx.Rngs) -> None:
        """A new, freshly initialised head for `num_classes` (0: none), and optionally another pooling."""
        self.config = dataclasses.replace(
            self.config, num_classes=num_classes, global_pool=global_pool or self.global_pool
        )
        self.head = nnx.List(
            Linear(dim, num_classes, dtype=self._real, param_dtype=self.param_dtype, rngs=rngs)
            if num_classes > 0
            else Identity()
            for dim in self.config.embed_dim
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades memory for time in training: each block's activations are computed again in the backward pass."""
        for stage in self.blocks:
            stage.grad_checkpointing = enable

    def set_attention(self, implementation: str, devices: Sequence[Any] = ()) -> None:
        """How self-attention is computed: "xla" (any device, the default), "cudnn" (NVIDIA GPUs, half precision only),
        or "tpu" (a kernel for TPUs, where tokens then lie in memory as that wants them; "xla" on other devices). "auto"
        is the fastest on the devices named, such as `jax.devices()`. On several TPUs jax has to know the mesh, by
        `jax.set_mesh` around what traces the model; all of its axes cut the batch.

        Raises ValueError for anything else. What "cudnn" cannot do is found when the model is first called.
        """
        if implementation == "auto" and devices:
            implementation = fastest_implementation(devices, self.dtype)
        if implementation not in ("xla", "cudnn", "tpu"):
            raise ValueError(
                f"implementation must be 'xla', 'cudnn', 'tpu', or 'auto' with devices; got {implementation!r}"
            )
        for _, module in nnx.iter_modules(self):
            if isinstance(module, Block):
                module.set_attention(implementation)

    def set_fp32_residual(self, enable: bool = True) -> None:
        """Keeps what flows from block to block in float32 in a model of half precision, as `torch.autocast` does.

        Attention and MLP return their float32 sums, which are added unrounded. Logits then lie about as near to the
        exact ones as torch's under autocast, at the cost of more memory traffic. Other models it leaves as they are.
        """
        for _, module in nnx.iter_modules(self):
            if isinstance(module, CrossViT):
                module.residual_dtype = module._real if enable else module.dtype
            elif isinstance(module, (Block, MultiScaleBlock)):
                module.set_wide(enable)

    def set_forward_mode(self, enable: bool = True) -> None:
        """Lets `jax.jvp`, `jax.linearize` and `jax.jacfwd` through, which gradients written by hand keep out.

        jax derives all gradients then: the outputs are the same up to rounding, and training takes more memory.
        Derivatives of gradients, such as `jax.jvp(jax.grad(loss), …)` or `jax.hessian`'s `jax.jacfwd(jax.jacrev(…))`,
        need no such thing, unless `set_attention` has taken "cudnn" or "tpu", whose kernels have no forward mode.
        """
        for _, module in nnx.iter_modules(self):
            if isinstance(module, (Attention, Conv, CrossAttention, GELU, LayerNorm, Linear)):
                module.set_forward_mode(enable)

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
        images: Array,
        rngs: nnx.Rngs | None,
        patch_size: tuple[int, ...] | None = None,
        masked: Sequence[Masked] | None = None,
        own_size: bool = False,
    ) -> tuple[list[Float[Array, "batch _ _"]], tuple[tuple[int, int], ...]]:
        """Each branch's class and patch tokens with position embeddings, and the grids of its patches."""
        if images.ndim != 4 or images.shape[-1] != self.config.in_chans:
            raise ValueError(
                f"images must have shape (batch, height, width, {self.config.in_chans}); got {images.shape}"
            )
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images must be normalised floats; got dtype {images.dtype}")
        if not self.pos_drop.deterministic and rngs is None and self.config.is_stochastic:
            raise ValueError(
                "dropout or drop path is on in training mode: pass rngs=nnx.Rngs(dropout=key), or call eval() first"
            )
        images = images.astype(jnp.promote_types(images.dtype, self.param_dtype))
        config, xs = self._at(patch_size), []
        if own_size:
            config = config.replace(image_size=images.shape[1:3])
        for i, (patch_embed, size) in enumerate(zip(self.patch_embed, config.branch_image_size, strict=True)):
            x = patch_embed(scale_image(images, size, config.crop_scale), config.patch_size[i])
            x = x.astype(self.residual_dtype)
            if masked is not None:
                mask, token = masked[i]
                x = jnp.where(mask[..., None], token.astype(x.dtype), x)
            cls_token = getattr(self, f"cls_token_{i}")[...].astype(x.dtype)
            cls_token = jnp.broadcast_to(cls_token, (x.shape[0], 1, x.shape[2]), out_sharding=jax.typeof(x).sharding)
            x = jnp.concatenate([cls_token, x], axis=1)
            pos_embed = getattr(self, f"pos_embed_{i}")[...]
            if config.grid_size[i] != self.config.grid_size[i]:
                pos_embed = resample_pos_embed(pos_embed, self.config.grid_size[i], config.grid_size[i])
            x = x + pos_embed.astype(x.dtype)
            xs.append(self.pos_drop(x, rngs=rngs))
        return xs, config.grid_size

    def _normalise(self, xs: list[Float[Array, "batch _ _"]]) -> list[Float[Array, "batch _ _"]]:
        """Each branch's final norm, in float32 or wider."""
        return [norm(x) for norm, x in zip(self.norm, xs, strict=True)]

    def _features(self, xs: list[Float[Array, "batch _ _"]]) -> list[Float[Array, "batch _ _"]]:
        """The same in the precision that flows from block to block."""
        return [x.astype(self.residual_dtype) for x in self._normalise(xs)]

    def _at(self, patch_size: tuple[int, ...] | None) -> CrossViTConfig:
        """The settings at a patch size."""
        return self.config if patch_size is None else self.config.at_patch_size(patch_size)

    def _as_map(self, x: Float[Array, "batch patches dim"], grid: tuple[int, int], output_fmt: str) -> Array:
        """Patch tokens in the format asked for."""
        if output_fmt == "NLC":
            return x
        x = x.reshape(x.shape[0], *grid, x.shape[2])
        return x if output_fmt == "NHWC" else x.transpose(0, 3, 1, 2)


def _token(tokens: int, dim: int, param_dtype, rngs: nnx.Rngs) -> nnx.Param:
    return nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (1, tokens, dim), param_dtype))


def create_model(
    name: str, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs | None = None, **overrides
) -> CrossViT:
    """A freshly initialised CrossViT.

    Args:
        name: a variant by its short, timm or IBM name, see `list_variants`.
        dtype, param_dtype, rngs: see `CrossViT`.
        **overrides: settings of `CrossViTConfig`: num_classes, in_chans, image_size, drop_path_rate, …

    Raises:
        ValueError, TypeError: see `get_config`; or `rngs` is missing.
    """
    config = get_config(name, **overrides)  # first: whoever asks for trained weights needs no rngs
    if rngs is None:
        raise TypeError("fresh weights are drawn from rngs=nnx.Rngs(seed), which is missing")
    return CrossViT(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
