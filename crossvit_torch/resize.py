"""torch's bicubic resize: cubic with a = -0.75, no antialiasing, edge pixels repeated."""

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
