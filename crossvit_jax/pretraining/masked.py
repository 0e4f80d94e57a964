"""Pre-training without labels: masked image modelling as SimMIM (arXiv 2111.09886) does it, over all branches.

Cells of an image are masked, the same for every branch, and each branch predicts the pixels of its own masked patches.
Masked pixels are zero before any branch resizes the image: whatever the patch grids are, none of them reaches a token.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from crossvit_jax.config import CrossViTConfig, cell_overlaps
from crossvit_jax.crossvit import CrossViT
from crossvit_jax.layers import Linear
from crossvit_jax.resize import scale_image

LEAST = 1e-5  # added to the number of masked pixels, as SimMIM does


class MaskedCrossViT(nnx.Module):
    """A CrossViT without a head, a token for masked patches in each branch, and a linear layer that predicts pixels.

    Args:
        config: of the CrossViT; its `num_classes` becomes 0.
        dtype: of the computation; default: `param_dtype`. Half precision keeps the predictions in float32.
        param_dtype: of the parameters.
        rngs: draws the initial parameters; used in no other way.
    """

    def __init__(self, config: CrossViTConfig, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs):
        config.require_all_tokens("masked image modelling")
        self.config = config = config.replace(num_classes=0)
        self.dtype = jnp.dtype(param_dtype if dtype is None else dtype)
        self.param_dtype = jnp.dtype(param_dtype)
        real = jnp.promote_types(self.param_dtype, jnp.float32)
        self.body = CrossViT(config, dtype=self.dtype, param_dtype=self.param_dtype, rngs=rngs)
        for i, dim in enumerate(config.embed_dim):
            token = nnx.initializers.normal(0.02)(rngs.params(), (1, 1, dim), self.param_dtype)
            setattr(self, f"mask_token_{i}", nnx.Param(token))
        self.decoder = nnx.List(
            Linear(dim, size * size * config.in_chans, dtype=real, param_dtype=self.param_dtype, rngs=rngs)
            for dim, size in zip(config.embed_dim, config.patch_size, strict=True)
        )

    def __call__(
        self,
        images: Float[Array, "batch height width channels"],
        cells: Bool[Array, "batch rows columns"],
        *,
        rngs: nnx.Rngs | None = None,
    ) -> list[Float[Array, "batch _ _"]]:
        """Of each branch the values of its patches' pixels (batch, patches, pixels), as `image_patches` has them, in
        float32 or wider.

        Args:
            images: channels last, ImageNet-normalised, of the model's size.
            cells: which are masked, of a grid over the whole image.
            rngs: stream `dropout`, for training mode.

        Raises ValueError as `CrossViT.forward_features`, or where the cells do not fill the images.
        """
        maps = self.forward_masked(images, cells, rngs=rngs)
        real = jnp.promote_types(self.param_dtype, jnp.float32)
        tokens = [x.reshape(x.shape[0], -1, x.shape[-1]).astype(real) for x in maps]
        return [linear(x) for linear, x in zip(self.decoder, tokens, strict=True)]

    def forward_masked(
        self,
        images: Float[Array, "batch height width channels"],
        cells: Bool[Array, "batch rows columns"],
        *,
        rngs: nnx.Rngs | None = None,
    ) -> list[Float[Array, "batch _ _ _"]]:
        """`CrossViT.forward_patches` of the masked images; their masked pixels have no part in it."""
        masks = patch_masks(cells, self.config)
        tokens = [getattr(self, f"mask_token_{i}")[...] for i in range(len(masks))]
        return self.body.forward_patches(masked_images(images, cells), list(zip(masks, tokens, strict=True)), rngs=rngs)

    def features(self, images: Float[Array, "batch height width channels"]) -> Float[Array, "batch features"]:
        """The means of each branch's patch tokens, one branch after the other; nothing is masked."""
        real = jnp.promote_types(self.param_dtype, jnp.float32)
        return jnp.concatenate([x.astype(real).mean((1, 2)) for x in self.body.forward_patches(images)], axis=-1)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """See `CrossViT.set_grad_checkpointing`."""
        self.body.set_grad_checkpointing(enable)

    # these reach every module below
    set_attention = CrossViT.set_attention
    set_forward_mode = CrossViT.set_forward_mode
    set_fp32_residual = CrossViT.set_fp32_residual

    def no_weight_decay(self) -> set[str]:
        """See `CrossViT.no_weight_decay`; also the tokens of masked patches."""
        tokens = {f"mask_token_{i}" for i in range(len(self.decoder))}
        return tokens | {f"{BODY}{name}" for name in self.body.no_weight_decay()}

    def is_head(self, name: str) -> bool:
        """Whether a parameter, by its dotted name, is none of the CrossViT's."""
        return not name.startswith(BODY)

    def unused(self, name: str) -> bool:
        """Whether a parameter, by its dotted name, has no part in the predictions, see `CrossViT.unused_by_patches`."""
        return name.startswith(BODY) and self.body.unused_by_patches(name.removeprefix(BODY))

    def layer_of(self, name: str) -> int:
        """See `CrossViT.layer_of`; the tokens of masked patches are embeddings, the decoder is in the last layer."""
        if name.startswith("mask_token"):
            return 0
        return self.body.layer_of(name.removeprefix(BODY) if name.startswith(BODY) else "head")


BODY = "body."  # before the names of the CrossViT's parameters


def masked_images(
    images: Float[Array, "batch height width channels"], cells: Bool[Array, "batch rows columns"]
) -> Float[Array, "batch height width channels"]:
    """The images with the pixels of masked cells set to 0, whatever they are: of normalised ones that is the mean.

    Raises ValueError where the cells do not fill the images.
    """
    (height, width), (rows, columns) = images.shape[1:3], cells.shape[1:]
    if height % rows or width % columns:
        raise ValueError(f"{rows} x {columns} cells do not fill images of {height} x {width} pixels")
    pixels = jnp.repeat(jnp.repeat(cells, height // rows, axis=1), width // columns, axis=2)
    return jnp.where(pixels[..., None], 0, images)


def patch_masks(cells: Bool[Array, "batch rows columns"], config: CrossViTConfig) -> list[Bool[Array, "batch _"]]:
    """The masked patches (batch, patches) of each branch, row by row: those of which masked cells cover half or
    more."""
    masks = []
    for branch in range(len(config.branches)):
        rows, columns = map(np.array, cell_overlaps(config, branch, cells.shape[1:]))
        area = rows.sum(1).max() * columns.sum(1).max()
        # whole numbers, which accelerators would round unless told otherwise
        covered = jnp.einsum("pr,brc,qc->bpq", rows * 1.0, cells * 1.0, columns * 1.0, precision="highest")
        masks.append((2 * covered >= area).reshape(len(cells), -1))
    return masks


def image_patches(
    images: Float[Array, "batch height width channels"], config: CrossViTConfig
) -> list[Float[Array, "batch _ _"]]:
    """What each branch is to predict (batch, patches, pixels): its image cut into patches, each one's pixels row by
    row, channels last."""
    patches = []
    for size, side in zip(config.branch_image_size, config.patch_size, strict=True):
        x = scale_image(images, size, config.crop_scale)
        batch, height, width, channels = x.shape
        x = x.reshape(batch, height // side, side, width // side, side, channels).transpose(0, 1, 3, 2, 4, 5)
        patches.append(x.reshape(batch, -1, side * side * channels))
    return patches


def mean_masked_pixels(
    masks: Sequence[Bool[Array, "batch _"]], config: CrossViTConfig
) -> Float[Array, "batch branches"]:
    """What `masked_loss` divides by: each branch's number of masked pixels, as the mean over all images, repeated for
    each.

    Counted over a whole batch, it makes the mean of the losses of its parts that of the batch.
    """
    counts = [mask.sum().astype(float) * side**2 for mask, side in zip(masks, config.patch_size, strict=True)]
    images = len(masks[0])
    return jnp.broadcast_to((jnp.stack(counts) + LEAST) / images, (images, len(counts)))


def masked_loss(
    predictions: Sequence[Float[Array, "batch _ _"]],
    patches: Sequence[Float[Array, "batch _ _"]],
    masks: Sequence[Bool[Array, "batch _"]],
    config: CrossViTConfig,
    masked_pixels: Float[Array, "batch branches"] | None = None,
) -> Float[Array, ""]:
    """The mean distance of predicted values from those of masked pixels, as a sum over the branches; float32 or wider.

    As transformers' `ViTForMaskedImageModeling` has it for a single grid of patches.

    Args:
        patches: see `image_patches`.
        masks: see `patch_masks`.
        masked_pixels: see `mean_masked_pixels`; by default that of these images.
    """
    if masked_pixels is None:
        masked_pixels = mean_masked_pixels(masks, config)
    distances = [
        (jnp.abs(prediction - patch) * mask[..., None]).sum()
        for prediction, patch, mask in zip(predictions, patches, masks, strict=True)
    ]
    distances = jnp.stack(distances)
    return (distances / masked_pixels.sum(0).astype(distances.dtype)).sum() / config.in_chans
