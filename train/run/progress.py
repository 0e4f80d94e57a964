"""What the user sees of a run: a progress bar on a terminal, and one line per epoch everywhere."""

import shutil
import sys
import time

from tqdm import tqdm


class Progress:
    """Shows loss, accuracy, learning rate, images/s and time left. Where output is no terminal, there is no bar."""

    def __init__(self, *, epochs: int, steps_per_epoch: int, done: int = 0, silent: bool = False):
        """`done` steps were done before; a silent one shows nothing, since another process speaks."""
        self._epochs = epochs
        self._total = epochs * steps_per_epoch
        self._done_before, self._silent = done, silent
        self._start = 0.0  # of the first step
        size = shutil.get_terminal_size()  # unlike tqdm's own guess never 0, with which tqdm shows nothing
        self._bar = tqdm(
            total=self._total,
            initial=done,
            unit="step",
            disable=silent or None,  # None is tqdm's way to say: unless stderr is a terminal
            leave=False,
            ncols=size.columns,
            nrows=size.lines,
            bar_format="{desc} {remaining} left |{bar}| {percentage:3.0f}%",
        )

    def step(self, *, epoch: int, loss: float, top1: float, lr: float, images_per_s: float) -> None:
        """One more step of `epoch` (from 1) is done. `top1` in percent."""
        self._start = self._start or time.perf_counter()
        shown = f"loss {loss:.3f} top-1 {top1:.1f}% lr {lr:.1e} {images_per_s:.0f} images/s"
        self._bar.set_description_str(f"epoch {epoch}/{self._epochs} {shown}", refresh=False)
        self._bar.update()

    def epoch(self, *, epoch: int, step: int, values: dict[str, float], images_per_s: float) -> None:
        """A line about an epoch (from 1) that ended after `step` steps, with the metrics that are there."""
        spent = time.perf_counter() - self._start if self._start else 0.0
        left = spent / max(1, step - self._done_before - 1) * (self._total - step)
        shown = [f"loss {values['train/loss']:.3f}", f"top-1 {values['train/top1']:.1f} %"]
        if "eval/top1" in values:
            shown.append(f"held-out loss {values['eval/loss']:.3f}, top-1 {values['eval/top1']:.2f} %")
        if "eval/ema_top1" in values:
            shown.append(f"average of the weights: top-1 {values['eval/ema_top1']:.2f} %")
        shown += [f"lr {values['train/lr']:.2e}", f"{images_per_s:.0f} images/s"]
        shown.append(f"{tqdm.format_interval(left)} left")
        self.say(f"epoch {epoch:{len(str(self._epochs))}}/{self._epochs} | " + " | ".join(shown))

    def say(self, line: str) -> None:
        """Print a line without disturbing the bar."""
        if not self._silent:
            self._bar.write(line, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        self._bar.close()
