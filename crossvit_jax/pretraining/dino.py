"""Pre-training without labels by self-distillation: the head, the loss and the centre of DINO (arXiv 2104.14294).

A student sees several crops of a picture, a teacher two large ones, and the student learns to say of each crop what the
teacher says of another. The teacher is a moving average of the student. Small crops run at their own size.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from crossvit_jax.config import CrossViTConfig
from crossvit_jax.crossvit import CrossViT
from crossvit_jax.layers import GELU, Linear, Sequential

_LEAST_NORM = 1e-12  # as torch's `normalize` has it


class DinoHead(nnx.Module):
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
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.mlp = Sequential(
            [
                Linear(dim, hidden, **kwargs),
                GELU(),
                Linear(hidden, hidden, **kwargs),
                GELU(),
                Linear(hidden, bottleneck, **kwargs),
            ]
        )
        self.last_layer = Linear(bottleneck, prototypes, use_bias=False, **kwargs)

    def __call__(self, x: Float[Array, "batch dim"]) -> Float[Array, "batch prototypes"]:
        x = self.mlp(x)
        x = x / jnp.maximum(_norm(x, -1), _LEAST_NORM)
        kernel = self.last_layer.kernel[...].astype(x.dtype)
        return x @ (kernel / _norm(kernel, 0))


def _norm(x: Float[Array, "rows columns"], axis: int) -> Float[Array, "_ _"]:
    return jnp.sqrt(jnp.square(x).sum(axis, keepdims=True))


class DinoCrossViT(nnx.Module):
    """A CrossViT without a head of its own, and DINO's on the class tokens of all branches; student or teacher.

    Args:
        config: of the CrossViT; its `num_classes` becomes 0.
        prototypes, hidden, bottleneck: see `DinoHead`.
        dtype: of the computation; default: `param_dtype`. Half precision keeps the head in float32.
        param_dtype: of the parameters.
        rngs: draws the initial parameters; used in no other way.
    """

    def __init__(
        self,
        config: CrossViTConfig,
        prototypes: int,
        *,
        hidden: int = 2048,
        bottleneck: int = 256,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config = config = config.replace(num_classes=0)
        real = jnp.promote_types(param_dtype, jnp.float32)
        self.body = CrossViT(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        kwargs = {"hidden": hidden, "bottleneck": bottleneck, "dtype": real, "param_dtype": param_dtype, "rngs": rngs}
        self.head = DinoHead(self.body.num_features, prototypes, **kwargs)

    def __call__(
        self, images: Float[Array, "batch height width channels"], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "batch prototypes"]:
        """The cosines of the head, in float32 or wider.

        Args:
            images: crops, channels last, ImageNet-normalised, of any size that divides into whole patches: they are not
                resized, but position embeddings are resampled.
            rngs: stream `dropout`, for training mode.

        Raises ValueError as `CrossViT.forward_features`.
        """
        return self.head(self.features(images, rngs=rngs))

    def features(
        self, images: Float[Array, "batch height width channels"], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "batch features"]:
        """The class tokens of all branches, one after the other; images as in the call."""
        real = jnp.promote_types(self.body.param_dtype, jnp.float32)
        tokens = self.body.forward_features(images, own_size=True, rngs=rngs)
        return jnp.concatenate([x[:, 0].astype(real) for x in tokens], axis=-1)

    # these reach every module below
    set_attention = CrossViT.set_attention
    set_forward_mode = CrossViT.set_forward_mode
    set_fp32_residual = CrossViT.set_fp32_residual

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
LAST_LAYER = "head.last_layer.kernel"


def dino_loss(
    student: Float[Array, "crops batch prototypes"],
    teacher: Float[Array, "large_crops batch prototypes"],
    centre: Float[Array, " prototypes"],
    *,
    student_temperature: float = 0.1,
    teacher_temperature: float | Float[Array, ""] = 0.04,
) -> Float[Array, ""]:
    """The mean cross-entropy of what the student says of each crop and the teacher of each large one, but for pairs of
    the same crop.

    Args:
        student: cosines of all crops, the large ones first.
        teacher: of the large crops; no gradient passes.
        centre: see `next_centre`.
    """
    targets = jax.nn.softmax((jax.lax.stop_gradient(teacher) - centre) / teacher_temperature)
    log_shares = jax.nn.log_softmax(student / student_temperature)
    losses = -jnp.einsum("tbk,sbk->ts", targets, log_shares, precision="highest") / student.shape[1]
    others = ~jnp.eye(len(teacher), len(student), dtype=bool)
    return jnp.where(others, losses, 0).sum() / others.sum()


def next_centre(
    centre: Float[Array, " prototypes"], teacher: Float[Array, "large_crops batch prototypes"], momentum: float = 0.9
) -> Float[Array, " prototypes"]:
    """The moving mean of what the teacher says, after one more step. Take it off what the teacher says of the next one.

    Args:
        teacher: of the whole batch, or its mean over the parts with one row each.
    """
    return centre * momentum + teacher.mean((0, 1)) * (1 - momentum)


def cosine_between(start: float, end: float, share: float | Float[Array, ""]) -> float | Float[Array, ""]:
    """From `start` to `end` along half a cosine; DINO's momentum of the teacher goes from 0.996 to 1 so.

    Args:
        share: of the steps that are done, from 0 to 1.
    """
    cos = math.cos if isinstance(share, int | float) else jnp.cos
    return end + (start - end) * (1 + cos(math.pi * share)) / 2


def next_teacher(teacher, student, momentum: float | Float[Array, ""]):
    """The teacher's parameters after one more step: momentum · teacher + (1 - momentum) · student, leaf by leaf."""
    return jax.tree.map(lambda old, new: momentum * old + (1 - momentum) * new, teacher, student)
