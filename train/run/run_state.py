"""What a run remembers beside its training state, in every checkpoint."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


class Best(NamedTuple):
    """The best evaluation so far."""

    value: float  # of the metric that chooses, in its unit
    epoch: int  # from 1
    step: int
    kind: str | None = None  # of the weights: params or ema; None: an earlier version did not keep it


@dataclass(frozen=True)
class RunState:
    """What a run remembers beside its training state."""

    step: int = 0
    log_bytes: int = 0  # of metrics.jsonl
    meter: dict[str, Any] | None = None  # that of `train.run.meter`, in the middle of an epoch
    best: Best | None = None
    lr: float | None = None  # learning rate of the last step

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "best": self.best and self.best._asdict()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "RunState":
        """Also from what version 0.1.0 wrote, where the value had the name of its metric, and step None meant none."""
        best = values["best"]
        if best is not None and best["step"] is not None:
            (value,) = (number for name, number in best.items() if name not in ("epoch", "step", "kind"))
            best = Best(value, best["epoch"], best["step"], best.get("kind"))
        else:
            best = None
        return cls(values["step"], values["log_bytes"], values["meter"], best, values.get("lr"))
