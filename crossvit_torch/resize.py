"""torch's resizing: bicubic with a = -0.75, and for features bilinear and by averages; no antialiasing.

Only parameters, which are brought to other patch sizes, are resized with antialiasing (and a = -0.5), as timm does it.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


def scale_image(
    x: Float[Tensor, "batch channels in_height in_width"], size: tuple[int, int], crop_scale: bool = False
) -> Float[Tensor, "batch channels height width"]:
    """Brings images to `size` (height, width): bicubic, or a centre crop if `crop_scale` and the image is large enough.

    As timm's `scale_image`. Images that have the size already are returned untouched.
    """
    in_size = tuple(x.shape[2:])
    if in_size == size:
        return x
    if crop_scale and size[0] <= in_size[0] and size[1] <= in_size[1]:
        top, left = (round((have - want) / 2.0) for have, want in zip(in_size, size, strict=True))
        return x[:, :, top : top + size[0], left : left + size[1]]
    return functional.interpolate(x, size=size, mode="bicubic", align_corners=False)


def resize_bilinear(
    x: Float[Tensor, "batch channels in_rows in_columns"], size: tuple[int, int]
) -> Float[Tensor, "batch channels rows columns"]:
    """Brings features to `size` (rows, columns).

    Features that have the size already are returned untouched.
    """
    if tuple(x.shape[2:]) == size:
        return x
    return functional.interpolate(x, size=size, mode="bilinear", align_corners=False)


def adaptive_average(
    x: Float[Tensor, "batch channels in_rows in_columns"], size: tuple[int, int]
) -> Float[Tensor, "batch channels rows columns"]:
    """Means over `size` (rows, columns) bins: bins overlap where sides do not divide."""
    return functional.adaptive_avg_pool2d(x, size)


def resize_kernel(
    kernel: Float[Tensor, "out_chans in_chans size size"], size: int
) -> Float[Tensor, "out_chans in_chans new_size new_size"]:
    """A kernel that cuts patches, for patches of another size: the pi-resize of FlexiViT (arXiv 2212.08013).

    As timm's `resample_patch_embed`: where patches grow, the products of the new kernel with bicubically enlarged
    patches are those of the old kernel with the patches as they were. Differentiable, in float32 or wider.
    """
    real = torch.promote_types(kernel.dtype, torch.float32)
    matrix = kernel_matrix(kernel.shape[-1], size).to(kernel.device, real)
    with torch.autocast(kernel.device.type, enabled=False):
        return (matrix @ kernel.to(real) @ matrix.T).to(kernel.dtype)


def resample_pos_embed(
    embedding: Float[Tensor, "1 tokens dim"], grid: tuple[int, int], new_grid: tuple[int, int]
) -> Float[Tensor, "1 new_tokens dim"]:
    """Position embeddings for another grid of (rows, columns); that of the class token stays as it is.

    As timm's `resample_abs_pos_embed`: bicubic, antialiased. Differentiable, in float32 or wider.
    """
    real = torch.promote_types(embedding.dtype, torch.float32)
    patches = embedding[:, 1:].to(real).reshape(1, *grid, -1).permute(0, 3, 1, 2)
    patches = functional.interpolate(patches, size=new_grid, mode="bicubic", antialias=True)
    return torch.cat([embedding[:, :1], patches.flatten(2).transpose(1, 2).to(embedding.dtype)], dim=1)


def kernel_matrix(size: int, new_size: int) -> Float[Tensor, "new_size size"]:
    """What `resize_kernel` multiplies by along each axis, in float64.

    The pseudo-inverse of resizing along both axes is that of each along its own.
    """
    return torch.linalg.pinv(antialiased_matrix(size, new_size)).T


def antialiased_matrix(in_size: int, out_size: int) -> Float[Tensor, "out_size in_size"]:
    """The weights of every input pixel in every output pixel along one axis, in float64."""
    pixels = torch.eye(in_size, dtype=torch.float64, device="cpu")[None, None]
    return functional.interpolate(pixels, size=(out_size, in_size), mode="bicubic", antialias=True)[0, 0]
