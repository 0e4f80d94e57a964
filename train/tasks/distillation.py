"""A trained classifier as the teacher of another: what it is, what it says of images, and the loss that follows it."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from convert.architecture import abstract_model
from crossvit_jax.config import CrossViTConfig


@dataclass(frozen=True)
class Teacher:
    """A model that is not trained. Hashable; its parameters are state of the task, not part of what is compiled."""

    config: CrossViTConfig
    outputs: tuple[int, ...]  # for each class of the run, the output of the teacher that stands for it
    attention_kernel: str = "xla"  # see `CrossViT.set_attention`
    params: Any = field(default=None, compare=False, repr=False)  # numpy arrays; none: a checkpoint has them

    def initial(self) -> Any:
        """The parameters for a new state. Where a checkpoint has them: NaN in their shapes, which nobody could mistake
        for a teacher."""
        if self.params is not None:
            return self.params
        _, shapes = abstract_model(self.config)
        return jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), shapes)

    def logits(self, params: Any, images: Float[Array, "batch height width channels"], *, dtype: Any) -> Array:
        """What it says of images, by the run's classes (batch, classes); no gradient passes.

        In evaluation mode. Images of another size than the teacher's are brought to it as timm's CrossViT does.

        Args:
            params: of the teacher, in float32.
            dtype: of the computation.
        """
        graphdef, _ = abstract_model(self.config, dtype=dtype)
        model = nnx.merge(graphdef, jax.lax.stop_gradient(params))
        model.eval()
        model.set_attention(self.attention_kernel)
        logits = model(images)
        if self.outputs != tuple(range(self.config.num_classes)):
            logits = logits[:, jnp.array(self.outputs)]
        return jax.lax.stop_gradient(logits)


def distillation_loss(
    logits: Float[Array, "batch classes"], taught: Float[Array, "batch classes"], temperature: float
) -> Float[Array, ""]:
    """How far the classes' probabilities are from the teacher's: KL(teacher ‖ model) · T², the mean over the images.

    Both logits are divided by the temperature T first, as in timm's `LogitDistillationTask`
    (timm/task/distillation.py). In float32 or wider.
    """
    real = jnp.promote_types(logits.dtype, jnp.float32)
    log_p, log_q = (jax.nn.log_softmax(x.astype(real) / temperature) for x in (taught, logits))
    return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)) * temperature**2
