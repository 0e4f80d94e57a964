"""What travels between a run of ours and a training checkpoint of torch: `TrainingState`, in timm's names and layouts.

Moments of an optimiser are arrays like the parameters, one for each, and are renamed and transposed as these are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from convert.errors import ConversionError
from convert.weights import Weights
from crossvit_jax.config import shown_value

MOST = 10**15  # of any number that a file tells
# torch's names of the moments, which optax calls mu and nu, or trace
MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What an optimiser does with gradients."""

    optimizer: Literal["adamw", "sgd"]
    lr: float  # of the last step
    peak_lr: float | None  # that a schedule starts from, where it is known
    weight_decay: float
    momentum: float | None = None  # of sgd
    decay_tokens: bool | None = None  # whether class tokens and position embeddings decay too; None: nothing does

    def __post_init__(self):
        """Raises ConversionError for numbers that no optimiser has, as a damaged file may tell."""
        for name in ("lr", "peak_lr", "weight_decay", "momentum"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < MOST:
                raise ConversionError(f"its {name} must be a number, 0 or more; got {shown_value(value)}")


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """A run at the end of a step."""

    weights: Weights  # those that are trained, not their average
    average: Mapping[str, np.ndarray] | None  # the moving average of the weights
    moments: Mapping[str, Mapping[str, np.ndarray]]  # by torch's name of the moment and timm's of the parameter
    updates: int | None  # that the moments have seen; None: the optimiser does not count
    epochs: int  # that are done
    rule: Rule
    notes: tuple[str, ...] = ()  # what is not carried over, for the user to read

    def __post_init__(self):
        """Raises ConversionError for counts that are none."""
        for name in ("epochs", "updates"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < MOST:
                raise ConversionError(f"its {name} must be a whole number, 0 or more; got {shown_value(value)}")


def decay_groups(shapes: Mapping[str, tuple[int, ...]], *, decay_tokens: bool) -> tuple[list[str], list[str]]:
    """The parameters that do not decay and those that do, in the order of `shapes`: an optimiser's two groups in timm.

    Args:
        decay_tokens: as in IBM's code, whose names of tokens and position embeddings timm's rule does not know.
    """
    spared = [name for name, shape in shapes.items() if _is_spared(name, len(shape), decay_tokens)]
    return spared, [name for name in shapes if name not in set(spared)]


def _is_spared(name: str, rank: int, decay_tokens: bool) -> bool:
    is_token = name.startswith(("pos_embed_", "cls_token_"))
    return rank <= 1 or name.endswith(".bias") or (is_token and not decay_tokens)
