"""The leaf layers with CrossViT's defaults: initialisation, epsilon, exact GELU."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional


def dropout_is_active(dropout: nn.Dropout) -> bool:
    """Whether this layer would change its input now (training mode and a rate above 0)."""
    return dropout.p > 0.0 and dropout.training


def draw_normal(parameter: Tensor, std: float) -> Tensor:
    """Fills it with N(0, std). On the meta device there is nothing to fill, and torch would import its compiler for it:
    more than a second."""
    return parameter if parameter.is_meta else nn.init.normal_(parameter, std=std)


class Linear(nn.Linear):
    """Linear layer with timm's initialisation: weights N(0, 0.02), biases 0.

    timm truncates at ±2, a hundred standard deviations away: no float32 draw ever gets there.
    """

    def reset_parameters(self) -> None:
        draw_normal(self.weight, 0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:
        if self.weight.dtype.itemsize >= x.dtype.itemsize:
            return super().forward(x)
        # the head of a model in half precision, whose tokens are pooled in float32
        return functional.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


Conv = nn.Conv2d  # torch's default initialisation: weights and biases U(±1/√fan_in)


class OutputConv(Conv):
    """A convolution whose result leaves the model: computed in float32 or wider, in a model of half precision too.

    Its kernel is odd, and the result as large as the input.
    """

    def __init__(self, in_chans: int, out_chans: int, kernel_size: int, **kwargs):
        super().__init__(in_chans, out_chans, kernel_size, padding=kernel_size // 2, **kwargs)

    def forward(self, x: Float[Tensor, "batch in_chans in_rows in_columns"]) -> Float[Tensor, "batch out_chans _ _"]:
        real = torch.promote_types(self.weight.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(real)
        with torch.autocast(x.device.type, enabled=False):
            return functional.conv2d(x.to(real), self.weight.to(real), bias, self.stride, self.padding)


class LayerNorm(nn.LayerNorm):
    """Layer norm; statistics in float32 or wider."""

    def __init__(self, dim: int, eps: float = 1e-6, **kwargs):
        super().__init__(dim, eps=eps, **kwargs)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        if self.weight.dtype.itemsize >= x.dtype.itemsize:
            return super().forward(x)
        # the last norm of a model in half precision, whose result leaves the model
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return functional.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class LayerNorm2d(LayerNorm):
    """The same over the channels of maps."""

    def forward(self, x: Float[Tensor, "batch dim rows columns"]) -> Float[Tensor, "batch dim rows columns"]:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


GroupNorm = nn.GroupNorm  # torch's epsilon, 1e-5
GELU = nn.GELU  # the exact (erf) GELU
ReLU = nn.ReLU
Identity = nn.Identity  # the head of a model without classes
Sequential = nn.Sequential
