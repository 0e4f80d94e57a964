"""Pre-training without labels: masked image modelling as SimMIM (arXiv 2111.09886) does it, over all branches.

Cells of an image are masked, the same for every branch, and each branch predicts the pixels of its own masked patches.
Masked pixels are zero before any branch resizes the image: whatever the patch grids are, none of them reaches a token.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from crossvit_jax.config import CrossViTConfig, cell_overlaps
from crossvit_torch.crossvit import CrossViT
from crossvit_torch.layers import Linear, draw_normal
from crossvit_torch.resize import scale_image

LEAST = 1e-5  # added to the number of masked pixels, as SimMIM does


class MaskedCrossViT(nn.Module):
    """A CrossViT without a head, a token for masked patches in each branch, and a linear layer that predicts pixels.

    Args:
        config: of the CrossViT; its `num_classes` becomes 0.
        dtype: of the computation; default: `param_dtype`. Half precision keeps the predictions in float32.
        param_dtype: of the parameters.
        device: where they live.
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
        config.require_all_tokens("masked image modelling")
        self.config = config = config.replace(num_classes=0)
        kwargs = {"dtype": param_dtype, "device": device}
        self.body = CrossViT(config, dtype=dtype, param_dtype=param_dtype, device=device)
        for i, dim in enumerate(config.embed_dim):
            token = draw_normal(torch.empty(1, 1, dim, **kwargs), 0.02)
            setattr(self, f"mask_token_{i}", nn.Parameter(token))
        self.decoder = nn.ModuleList(
            Linear(dim, size * size * config.in_chans, **kwargs)
            for dim, size in zip(config.embed_dim, config.patch_size, strict=True)
        )

    def forward(
        self, images: Float[Tensor, "batch channels height width"], cells: Bool[Tensor, "batch rows columns"]
    ) -> list[Float[Tensor, "batch _ _"]]:
        """Of each branch the values of its patches' pixels (batch, patches, pixels), as `image_patches` has them, in
        float32 or wider.

        Args:
            images: channels first, ImageNet-normalised, of the model's size.
            cells: which are masked, of a grid over the whole image.

        Raises ValueError as `CrossViT.forward_features`, or where the cells do not fill the images.
        """
        maps = self.forward_masked(images, cells)
        real = torch.promote_types(self.body.param_dtype, torch.float32)
        tokens = [x.flatten(2).transpose(1, 2).to(real) for x in maps]
        with torch.autocast(images.device.type, enabled=False):
            return [linear(x) for linear, x in zip(self.decoder, tokens, strict=True)]

    def forward_masked(
        self, images: Float[Tensor, "batch channels height width"], cells: Bool[Tensor, "batch rows columns"]
    ) -> list[Float[Tensor, "batch _ _ _"]]:
        """`CrossViT.forward_patches` of the masked images; their masked pixels have no part in it."""
        masks = patch_masks(cells, self.config)
        tokens = [getattr(self, f"mask_token_{i}") for i in range(len(masks))]
        return self.body.forward_patches(masked_images(images, cells), list(zip(masks, tokens, strict=True)))

    def features(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features"]:
        """The means of each branch's patch tokens, one branch after the other; nothing is masked."""
        real = torch.promote_types(self.body.param_dtype, torch.float32)
        return torch.cat([x.to(real).mean((2, 3)) for x in self.body.forward_patches(images)], dim=-1)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """See `CrossViT.set_grad_checkpointing`."""
        self.body.set_grad_checkpointing(enable)

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
    images: Float[Tensor, "batch channels height width"], cells: Bool[Tensor, "batch rows columns"]
) -> Float[Tensor, "batch channels height width"]:
    """The images with the pixels of masked cells set to 0, whatever they are: of normalised ones that is the mean.

    Raises ValueError where the cells do not fill the images.
    """
    (height, width), (rows, columns) = images.shape[2:], cells.shape[1:]
    if height % rows or width % columns:
        raise ValueError(f"{rows} x {columns} cells do not fill images of {height} x {width} pixels")
    pixels = cells.repeat_interleave(height // rows, dim=1).repeat_interleave(width // columns, dim=2)
    return torch.where(pixels[:, None], 0, images)


def patch_masks(cells: Bool[Tensor, "batch rows columns"], config: CrossViTConfig) -> list[Bool[Tensor, "batch _"]]:
    """The masked patches (batch, patches) of each branch, row by row: those of which masked cells cover half or
    more."""
    masks = []
    for branch in range(len(config.branches)):
        overlaps = cell_overlaps(config, branch, tuple(cells.shape[1:]))
        rows, columns = (torch.tensor(overlap, dtype=torch.float64, device=cells.device) for overlap in overlaps)
        area = rows.sum(1).max() * columns.sum(1).max()
        covered = torch.einsum("pr,brc,qc->bpq", rows, cells.double(), columns)
        masks.append((2 * covered >= area).flatten(1))
    return masks


def image_patches(
    images: Float[Tensor, "batch channels height width"], config: CrossViTConfig
) -> list[Float[Tensor, "batch _ _"]]:
    """What each branch is to predict (batch, patches, pixels): its image cut into patches, each one's pixels row by
    row, channels last."""
    patches = []
    for size, side in zip(config.branch_image_size, config.patch_size, strict=True):
        x = scale_image(images, size, config.crop_scale)
        batch, channels, height, width = x.shape
        x = x.reshape(batch, channels, height // side, side, width // side, side).permute(0, 2, 4, 3, 5, 1)
        patches.append(x.reshape(batch, -1, side * side * channels))
    return patches


def mean_masked_pixels(
    masks: Sequence[Bool[Tensor, "batch _"]], config: CrossViTConfig
) -> Float[Tensor, "batch branches"]:
    """What `masked_loss` divides by: each branch's number of masked pixels, as the mean over all images, repeated for
    each.

    Counted over a whole batch, it makes the mean of the losses of its parts that of the batch.
    """
    counts = [mask.sum().double() * side**2 for mask, side in zip(masks, config.patch_size, strict=True)]
    images = len(masks[0])
    return ((torch.stack(counts) + LEAST) / images).expand(images, len(counts))


def masked_loss(
    predictions: Sequence[Float[Tensor, "batch _ _"]],
    patches: Sequence[Float[Tensor, "batch _ _"]],
    masks: Sequence[Bool[Tensor, "batch _"]],
    config: CrossViTConfig,
    masked_pixels: Float[Tensor, "batch branches"] | None = None,
) -> Float[Tensor, ""]:
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
        ((prediction - patch).abs() * mask[..., None]).sum()
        for prediction, patch, mask in zip(predictions, patches, masks, strict=True)
    ]
    distances = torch.stack(distances)
    return (distances / masked_pixels.sum(0).to(distances.dtype)).sum() / config.in_chans
