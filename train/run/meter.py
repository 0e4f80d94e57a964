"""The metrics of the steps on their way from the devices to the log and the progress bar."""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax

from convert.errors import UserError
from train.run.metrics_log import MetricsLog, NoLog
from train.run.progress import Progress

if TYPE_CHECKING:
    from train.tasks.task import Metric

_SCALED = ("skipped", "loss_scale")  # of a step in float16
STEPS_BEHIND = 2  # metrics are fetched so many steps late, so that the devices never wait for the host


class TrainingFailed(UserError):
    """The run cannot go on."""

    status = 1


class Sums:
    """Of some steps: the loss and the task's metrics, images that could not be read, and the steps.

    In float16 also the steps that were skipped, and the last loss scale.
    """

    def __init__(self, totals: Mapping[str, float] | None = None):
        self.totals: dict[str, float] = {"bad": 0, "steps": 0, **(totals or {})}

    def add(self, values: Mapping[str, float], bad: int, scaled: Mapping[str, float]) -> None:
        """A step. One whose loss is infinite or NaN was skipped: it has no part in the means.

        Args:
            scaled: `loss_scale` and `skipped` of a step in float16; otherwise nothing.
        """
        counted = {**values, "steps": 1} if math.isfinite(values["loss"]) else {}
        for name, value in {**counted, "bad": bad}.items():
            self.totals[name] = self.totals.get(name, 0) + value
        if scaled:
            self.totals["skipped"] = self.totals.get("skipped", 0) + scaled["skipped"]
            self.totals["loss_scale"] = scaled["loss_scale"]

    def values(self, lr: float) -> dict[str, float]:
        """The means by their names in the log, and how many images could not be read."""
        others, steps = ("bad", "steps", *_SCALED), self.totals["steps"]
        means = {f"train/{name}": total / steps for name, total in self.totals.items() if name not in others and steps}
        scaled = {f"train/{name}": self.totals[name] for name in _SCALED if name in self.totals}
        return {**means, **scaled, "train/lr": lr, "train/bad_images": self.totals["bad"]}


class Meter:
    """Takes the metrics of a run's steps, and tells them to the log, the progress bar and, after an epoch, the loop."""

    def __init__(
        self,
        log: MetricsLog | NoLog,
        progress: Progress,
        *,
        metrics: "Sequence[Metric]",
        step: int,
        batch_size: int,
        log_every: int,
        learning_rate: Callable[[int], float],
        check_bad: Callable[[int], None] = lambda count: None,
        state: dict[str, Any] | None = None,
    ):
        """
        Args:
            metrics: of the task.
            step: training steps of the run that are done.
            learning_rate: of the step after so many.
            check_bad: is told how many images of the epoch could not be read so far, and may raise.
            state: what `catch_up` returned where a run stopped in the middle of an epoch.
        """
        self._log, self._progress = log, progress
        self._scale = {metric.name: 100.0 if metric.unit == "%" else 1.0 for metric in metrics}
        self._batch_size, self._log_every = batch_size, log_every
        self._learning_rate, self._check_bad = learning_rate, check_bad
        self.step = step  # steps that are done and known
        self._pending: deque[dict[str, jax.Array]] = deque()
        self._resumed = state

    def begin(self, epoch: int) -> None:
        """What is added from now on belongs to this epoch, counted from 1."""
        self._epoch = epoch
        state, self._resumed = self._resumed or {"epoch": None, "window": None}, None
        self._whole, self._window = Sums(state["epoch"]), Sums(state["window"])  # all, and what is not logged yet
        self._start, self._timed = time.perf_counter(), 0  # of the clock, and steps since then

    def start_clock(self) -> None:
        """Leaves out of the speed what was waited for until now, and the step that was done meanwhile."""
        self._start, self._timed = time.perf_counter(), -1

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
        return {"epoch": dict(self._whole.totals), "window": dict(self._window.totals)}

    def finish(self) -> tuple[dict[str, float], float]:
        """Write what is not logged yet; the epoch's means by the names they have in the log, and images/s."""
        self.catch_up()
        if self._window.totals["steps"] or self._window.totals.get("skipped"):
            self._write()
        return self._whole.values(self._lr), self._images_per_s

    def _take(self, metrics: dict[str, jax.Array]) -> None:
        told = {name: float(value) for name, value in jax.device_get(metrics).items()}
        bad = int(told.pop("bad"))
        scaled = {name: told.pop(name) for name in _SCALED if name in told}
        values = {name: self._scale.get(name, 1.0) * value for name, value in told.items()}
        self.step += 1
        self._check_numbers(values["loss"], scaled)
        for sums in (self._whole, self._window):
            sums.add(values, bad, scaled)
        self._check_bad(int(self._whole.totals["bad"]))
        self._timed += 1
        speed = self._images_per_s
        self._progress.step(epoch=self._epoch, values=values, lr=self._lr, images_per_s=speed)
        if self.step % self._log_every == 0:
            shown = {"epoch": self._epoch, "step": self.step, "values": self._window.values(self._lr)}
            self._progress.steps(**shown, images_per_s=speed)
            self._write()

    def _check_numbers(self, loss: float, scaled: Mapping[str, float]) -> None:
        skipped = bool(scaled.get("skipped"))
        if scaled["loss_scale"] >= 1 if skipped else math.isfinite(loss):
            return
        where = f"in step {self.step} (epoch {self._epoch}, learning rate {self._lr:g})"
        helps = "a lower --lr, a longer --warmup-epochs or --clip-grad may help"
        if skipped:
            raise TrainingFailed(
                f"gradients are infinite or NaN {where} at a loss scale of {scaled['loss_scale']:g}: step after step "
                f"was skipped; {helps}, or --precision float32"
            )
        raise TrainingFailed(f"the loss became {loss} {where}; {helps}")

    @property
    def _lr(self) -> float:
        return self._learning_rate(max(0, self.step - 1))

    @property
    def _images_per_s(self) -> float:
        """Since the epoch began: the metrics of several steps may come at once, so that shorter times tell nothing."""
        return max(0, self._timed) * self._batch_size / (time.perf_counter() - self._start)

    def _write(self) -> None:
        values = self._window.values(self._lr)
        self._log.write(step=self.step, epoch=self._epoch, values=values, speed=self._images_per_s)
        self._window = Sums()
