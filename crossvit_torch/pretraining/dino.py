"""Pre-training without labels by self-distillation: the head, the loss and the centre of DINO (arXiv 2104.14294).

A student sees several crops of a picture, a teacher two large ones, and the student learns to say of each crop what the
teacher says of another. The teacher is a moving average of the student. Small crops run at their own size.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from crossvit_jax.config import CrossViTConfig
from crossvit_torch.crossvit import CrossViT
from crossvit_torch.layers import GELU, Linear, Sequential

_LEAST_NORM = 1e-12  # as torch's `normalize` has it


class DinoHead(nn.Module):
    """Three linear layers, a vector of length 1, and its cosines with `prototypes` learned directions.

    The last layer is torch's `weight_norm` with lengths that stay 1: its weights are divided by their norms.

    Args:
        dim: of the features.
        prototypes: outputs; 65,536 in the paper, for ImageNet.
        hidden: width of the layers between.
        bottleneck: of the vector.
    """

    def __init__(
        self,
        dim: int,
        prototypes: int,
        *,
        hidden: int = 2048,
        bottleneck: int = 256,
        param_dtype: torch.dtype = torch.float32,
        device=None,
    ):
        super().__init__()
        kwargs = {"dtype": param_dtype, "device": device}
        self.mlp = Sequential(
            Linear(dim, hidden, **kwargs),
            GELU(),
            Linear(hidden, hidden, **kwargs),
            GELU(),
            Linear(hidden, bottleneck, **kwargs),
        )
        self.last_layer = Linear(bottleneck, prototypes, bias=False, **kwargs)

    def forward(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch prototypes"]:
        x = self.mlp(x)
        x = x / _norm(x).clamp(min=_LEAST_NORM)
        weight = self.last_layer.weight.to(x.dtype)
        return functional.linear(x, weight / _norm(weight))


def _norm(x: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows 1"]:
    return x.square().sum(1, keepdim=True).sqrt()


class DinoCrossViT(nn.Module):
    """A CrossViT without a head of its own, and DINO's on the class tokens of all branches; student or teacher.

    Args:
        config: of the CrossViT; its `num_classes` becomes 0.
        prototypes, hidden, bottleneck: see `DinoHead`.
        dtype: of the computation; default: `param_dtype`. Half precision keeps the head in float32.
        param_dtype: of the parameters.
        device: where they live.
    """

    def __init__(
        self,
        config: CrossViTConfig,
        prototypes: int,
        *,
        hidden: int = 2048,
        bottleneck: int = 256,
        dtype: torch.dtype | None = None,
        param_dtype: torch.dtype = torch.float32,
        device=None,
    ):
        super().__init__()
        self.config = config = config.replace(num_classes=0)
        self.body = CrossViT(config, dtype=dtype, param_dtype=param_dtype, device=device)
        kwargs = {"hidden": hidden, "bottleneck": bottleneck, "param_dtype": param_dtype, "device": device}
        self.head = DinoHead(self.body.num_features, prototypes, **kwargs)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch prototypes"]:
        """The cosines of the head, in float32 or wider.

        Args:
            images: crops, channels first, ImageNet-normalised, of any size that divides into whole patches: they are
                not resized, but position embeddings are resampled.

        Raises ValueError as `CrossViT.forward_features`.
        """
        features = self.features(images)
        with torch.autocast(images.device.type, enabled=False):
            return self.head(features)

    def features(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features"]:
        """The class tokens of all branches, one after the other; images as in the call."""
        real = torch.promote_types(self.body.param_dtype, torch.float32)
        tokens = self.body.forward_features(images, own_size=True)
        return torch.cat([x[:, 0].to(real) for x in tokens], dim=-1)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """See `CrossViT.set_grad_checkpointing`."""
        self.body.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """See `CrossViT.no_weight_decay`; also the last layer, of which only the direction counts."""
        return {LAST_LAYER} | {f"{BODY}{name}" for name in self.body.no_weight_decay()}

    def is_head(self, name: str) -> bool:
        """Whether a parameter, by its dotted name, is none of the CrossViT's."""
        return not name.startswith(BODY)

    def layer_of(self, name: str) -> int:
        """See `CrossViT.layer_of`; the head is in the last layer."""
        return self.body.layer_of(name.removeprefix(BODY) if name.startswith(BODY) else "head")


BODY = "body."  # before the names of the CrossViT's parameters
LAST_LAYER = "head.last_layer.weight"


def dino_loss(
    student: Float[Tensor, "crops batch prototypes"],
    teacher: Float[Tensor, "large_crops batch prototypes"],
    centre: Float[Tensor, " prototypes"],
    *,
    student_temperature: float = 0.1,
    teacher_temperature: float = 0.04,
) -> Float[Tensor, ""]:
    """The mean cross-entropy of what the student says of each crop and the teacher of each large one, but for pairs of
    the same crop.

    Args:
        student: cosines of all crops, the large ones first.
        teacher: of the large crops; no gradient passes.
        centre: see `next_centre`.
    """
    targets = ((teacher.detach() - centre) / teacher_temperature).softmax(-1)
    log_shares = (student / student_temperature).log_softmax(-1)
    losses = -torch.einsum("tbk,sbk->ts", targets, log_shares) / student.shape[1]
    others = ~torch.eye(len(teacher), len(student), dtype=torch.bool, device=losses.device)
    return torch.where(others, losses, 0).sum() / others.sum()


def next_centre(
    centre: Float[Tensor, " prototypes"], teacher: Float[Tensor, "large_crops batch prototypes"], momentum: float = 0.9
) -> Float[Tensor, " prototypes"]:
    """The moving mean of what the teacher says, after one more step. Take it off what the teacher says of the next one.

    Args:
        teacher: of the whole batch, or its mean over the parts with one row each.
    """
    return centre * momentum + teacher.detach().mean((0, 1)) * (1 - momentum)


def cosine_between(start: float, end: float, share: float) -> float:
    """From `start` to `end` along half a cosine; DINO's momentum of the teacher goes from 0.996 to 1 so.

    Args:
        share: of the steps that are done, from 0 to 1.
    """
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


@torch.no_grad()
def next_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """The teacher's parameters after one more step, in place: momentum · teacher + (1 - momentum) · student."""
    for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
        old.mul_(momentum).add_(new, alpha=1 - momentum)
