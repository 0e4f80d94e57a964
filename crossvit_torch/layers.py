"""The leaf layers with CrossViT's defaults: initialisation, epsilon, exact GELU."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional


def dropout_is_active(dropout: nn.Dropout) -> bool:
    """Whether this layer would change its input now (training mode and a rate above 0)."""
    return dropout.p > 0.0 and dropout.training


class Linear(nn.Linear):
    """Linear layer with timm's initialisation: weights N(0, 0.02), biases 0.

    timm truncates at ±2, a hundred standard deviations away: no float32 draw ever gets there.
    """

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:
        if self.weight.dtype.itemsize >= x.dtype.itemsize:
            return super().forward(x)
        # the head of a model in half precision, whose tokens are pooled in float32
        return functional.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


Conv = nn.Conv2d  # torch's default initialisation: weights and biases U(±1/√fan_in)


class LayerNorm(nn.LayerNorm):
    """Layer norm with epsilon 1e-6."""

    def __init__(self, dim: int, **kwargs):
        super().__init__(dim, eps=1e-6, **kwargs)


GELU = nn.GELU  # the exact (erf) GELU
ReLU = nn.ReLU
Identity = nn.Identity  # the head of a model without classes
Sequential = nn.Sequential
