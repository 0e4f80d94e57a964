"""What the user sees of a run: a progress bar on a terminal, lines with the time elsewhere, and one per epoch."""

import contextlib
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from convert.streams import tell

if TYPE_CHECKING:
    from train.tasks.task import Metric


def open_bar(*, disable: bool | None = None, **settings: Any) -> tqdm:
    """A bar of tqdm's, gone when it is closed. `disable` None is tqdm's way to say: unless stderr is a terminal."""
    size = shutil.get_terminal_size()  # unlike tqdm's own guess never 0, with which tqdm shows nothing
    return tqdm(disable=disable, leave=False, ncols=size.columns, nrows=size.lines, **settings)


class Progress:
    """Shows loss, metrics, learning rate, images/s and time left. Where output is no terminal, there are lines
    in place of the bar."""

    def __init__(
        self,
        metrics: "Sequence[Metric]",
        choosing: "Metric",
        *,
        epochs: int,
        steps_per_epoch: int,
        done: int = 0,
        silent: bool = False,
    ):
        """
        Args:
            metrics: of the task.
            choosing: the one that is told of the held-out images; the others are in the log.
            done: steps that were done before.
            silent: show nothing, since another process speaks.
        """
        self._metrics, self._choosing = metrics, choosing
        self._epochs = epochs
        self._total = epochs * steps_per_epoch
        self._done_before, self._silent = done, silent
        self._start = 0.0  # of the first step
        self._bar = open_bar(
            total=self._total,
            initial=done,
            unit="step",
            disable=silent or None,
            bar_format="{desc} {remaining} left |{bar}| {percentage:3.0f}%",
        )

    def step(self, *, epoch: int, values: Mapping[str, float], lr: float, images_per_s: float) -> None:
        """One more step of `epoch` (from 1) is done, with its loss and metrics in their units."""
        self._start = self._start or time.perf_counter()
        if self._bar.disable:
            return
        shown = [f"loss {values['loss']:.3f}", *self._shown(values), f"lr {lr:.1e} {images_per_s:.0f} images/s"]
        self._bar.set_description_str(f"epoch {epoch}/{self._epochs} {' '.join(shown)}", refresh=False)
        try:
            self._bar.update()
        except OSError:  # the terminal is closed, and the run goes on
            self._bar.disable = True

    def steps(self, *, epoch: int, step: int, values: Mapping[str, float], images_per_s: float) -> None:
        """A line about the steps since the last such line, where there is no bar: with the time.

        Args:
            step: of the run, from 1.
            values: means over the steps by their names in the log.
        """
        if self._silent or not self._bar.disable:
            return
        loss = f"loss {values['train/loss']:.3f}" if "train/loss" in values else "skipped"  # all of them, in float16
        shown = [loss, *self._shown(values, "train/"), f"lr {values['train/lr']:.2e}"]
        shown += [f"{images_per_s:.0f} images/s", f"{self._left(step)} left"]
        tell(f"{time.strftime('%Y-%m-%d %H:%M:%S')} step {step}/{self._total}, epoch {epoch} | {' | '.join(shown)}")

    def epoch(self, *, epoch: int, step: int, values: dict[str, float], images_per_s: float) -> None:
        """A line about an epoch (from 1) that ended after `step` steps, with the metrics that are there."""
        # an epoch that was trained elsewhere has no loss of training
        loss = [f"loss {values['train/loss']:.3f}"] if "train/loss" in values else []
        shown = [*loss, *self._shown(values, "train/")]
        held_out, averaged = f"eval/{self._choosing.name}", f"eval/ema_{self._choosing.name}"
        if held_out in values:
            metric = f", {self._choosing.shown(values[held_out])}" * (self._choosing.name != "loss")
            shown.append(f"held-out loss {values['eval/loss']:.3f}{metric}")
        if averaged in values:
            shown.append(f"average of the weights: {self._choosing.shown(values[averaged])}")
        shown.append(f"lr {values['train/lr']:.2e}")
        if images_per_s:  # not of an epoch that was trained elsewhere, or before an interruption
            shown += [f"{images_per_s:.0f} images/s", f"{self._left(step)} left"]
        if not self._silent:
            line = f"epoch {epoch:{len(str(self._epochs))}}/{self._epochs} | " + " | ".join(shown)
            if self._bar.disable:
                tell(line)
            else:
                with self._bar.external_write_mode():  # without disturbing the bar
                    tell(line)

    def _left(self, step: int) -> str:
        """The time that the steps after this one will take, by those so far."""
        spent = time.perf_counter() - self._start if self._start else 0.0
        return tqdm.format_interval(spent / max(1, step - self._done_before - 1) * (self._total - step))

    def _shown(self, values: Mapping[str, float], prefix: str = "") -> list[str]:
        """The task's metrics that are among the values."""
        known = [metric for metric in self._metrics if prefix + metric.name in values]
        return [metric.shown(values[prefix + metric.name], digits=1) for metric in known]

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._bar.close()
