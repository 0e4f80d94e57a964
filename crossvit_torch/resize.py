"""torch's resizing: bicubic with a = -0.75, and for features bilinear and by averages; no antialiasing."""

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
