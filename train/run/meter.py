"""The metrics of the steps on their way from the devices to the log and the progress bar."""

import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from convert.errors import UserError
from train.run.metrics_log import MetricsLog
from train.run.progress import Progress

STEPS_BEHIND = 2  # metrics are fetched so many steps late, so that the devices never wait for the host


class TrainingFailed(UserError):
    """The run cannot go on; the message is one line."""

    status = 1


@dataclass
class Sums:
    """Of some steps: losses, accuracies in percent, and images that could not be read."""

    loss: float = 0.0
    top1: float = 0.0
    bad: int = 0
    steps: int = 0

    def add(self, loss: float, top1: float, bad: int) -> None:
        self.loss, self.top1, self.bad, self.steps = self.loss + loss, self.top1 + top1, self.bad + bad, self.steps + 1

    def values(self, lr: float) -> dict[str, float]:
        """By their names in the log."""
        return {
            "train/loss": self.loss / self.steps,
            "train/top1": self.top1 / self.steps,
            "train/lr": lr,
            "train/bad_images": self.bad,
        }


class Meter:
    """Takes the metrics of one epoch's steps, and tells them to the log, the progress bar and, at the end, the loop."""

    def __init__(
        self,
        log: MetricsLog,
        progress: Progress,
        *,
        epoch: int,
        step: int,
        batch_size: int,
        log_every: int,
        learning_rate: Callable[[int], float],
        check_bad: Callable[[int], None] = lambda count: None,
        state: dict[str, Any] | None = None,
    ):
        """
        Args:
            epoch: counted from 1.
            step: training steps of the run that are done.
            learning_rate: of the step after so many.
            check_bad: is told how many images of the epoch could not be read so far, and may raise.
            state: of a meter that stopped in the middle of the epoch.
        """
        self._log, self._progress = log, progress
        self._epoch, self._batch_size, self._log_every = epoch, batch_size, log_every
        self._learning_rate, self._check_bad = learning_rate, check_bad
        self.step = step  # steps that are done and known
        self._pending: deque[dict[str, jax.Array]] = deque()
        state = state or {"epoch": {}, "window": {}}
        self._whole, self._window = Sums(**state["epoch"]), Sums(**state["window"])  # all, and what is not logged yet
        self._clock = self._window_clock = Clock()

    def add(self, metrics: dict[str, jax.Array]) -> None:
        """The metrics of the next step, perhaps not computed yet. Raises TrainingFailed as `catch_up` does."""
        self._pending.append(metrics)
        if len(self._pending) > STEPS_BEHIND:
            self._take(self._pending.popleft())

    def catch_up(self) -> dict[str, Any]:
        """Wait for the last steps; what another meter needs to go on from here, as JSON values.

        Raises TrainingFailed if the loss of a step is NaN or infinite, and what `check_bad` raises.
        """
        while self._pending:
            self._take(self._pending.popleft())
        return {"epoch": dataclasses.asdict(self._whole), "window": dataclasses.asdict(self._window)}

    def finish(self) -> tuple[dict[str, float], float]:
        """Write what is not logged yet; the epoch's means by the names they have in the log, and images/s."""
        self.catch_up()
        if self._window.steps:
            self._write()
        return self._whole.values(self._lr), self._clock.steps_per_s * self._batch_size

    def _take(self, metrics: dict[str, jax.Array]) -> None:
        loss, top1, bad = (float(jax.device_get(metrics[name])) for name in ("loss", "top1", "bad"))
        self.step += 1
        if not math.isfinite(loss):
            raise TrainingFailed(
                f"the loss became {loss} in step {self.step} (epoch {self._epoch}, learning rate {self._lr:g}); "
                "a lower --lr, a longer --warmup-epochs or --clip-grad may help"
            )
        for sums in (self._whole, self._window):
            sums.add(loss, 100 * top1, int(bad))
        self._clock.tick()
        if self._window_clock is not self._clock:
            self._window_clock.tick()
        self._check_bad(self._whole.bad)
        speed = self._window_clock.steps_per_s * self._batch_size
        self._progress.step(epoch=self._epoch, loss=loss, top1=100 * top1, lr=self._lr, images_per_s=speed)
        if self.step % self._log_every == 0:
            self._write()

    @property
    def _lr(self) -> float:
        return self._learning_rate(max(0, self.step - 1))

    def _write(self) -> None:
        speed = self._window_clock.steps_per_s * self._batch_size
        self._log.write(step=self.step, epoch=self._epoch, values=self._window.values(self._lr), speed=speed)
        self._window, self._window_clock = Sums(), Clock()


class Clock:
    """Steps per second since it was made."""

    def __init__(self):
        self._start, self._steps = time.perf_counter(), 0

    def tick(self) -> None:
        self._steps += 1

    @property
    def steps_per_s(self) -> float:
        return self._steps / (time.perf_counter() - self._start)
