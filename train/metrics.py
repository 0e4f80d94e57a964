"""The metrics of a run as lines of JSON and as TensorBoard events."""

import json
from pathlib import Path
from typing import Any


class MetricsLog:
    """Writes `metrics.jsonl` and TensorBoard events into a folder. Each line is on disk when `write` returns."""

    def __init__(self, folder: Path):
        from tensorboardX import SummaryWriter

        self._lines = open(folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self._events = SummaryWriter(str(folder))

    def write(self, *, step: int, epoch: int, values: dict[str, float]) -> None:
        """One line: `step` (training steps done), `epoch` (epochs begun, from 1) and the values by name.

        Names are `train/loss`, `eval/top1` and so on. Raises ValueError for NaN and infinity, which are no JSON.
        """
        line: dict[str, Any] = {"step": step, "epoch": epoch, **values}
        self._lines.write(json.dumps(line, allow_nan=False) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        self._events.flush()

    def close(self) -> None:
        self._lines.close()
        self._events.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
