"""A run goes on when nobody can see it any more."""

import io
from contextlib import closing

from train.run import progress
from train.run.progress import Progress
from train.tasks.task import Metric


class _Hung(io.StringIO):
    """A terminal that is closed after some writing."""

    left = 3

    def write(self, text):
        self.left -= 1
        if self.left < 0:
            raise OSError(5, "Input/output error")
        return super().write(text)

    def isatty(self):
        return True


def test_a_bar_on_a_closed_terminal_does_not_end_the_run(monkeypatch):
    opened, terminal = progress.open_bar, _Hung()
    monkeypatch.setattr(
        progress, "open_bar", lambda **how: opened(**how | {"disable": False, "file": terminal, "mininterval": 0})
    )
    metric = Metric("top1", "top-1", "%", "max")
    with closing(Progress((metric,), metric, epochs=1, steps_per_epoch=9)) as shown:
        for _ in range(9):
            shown.step(epoch=1, values={"loss": 1.0, "top1": 50.0}, lr=0.1, images_per_s=10.0)
        shown.epoch(epoch=1, step=9, values={"train/loss": 1.0, "train/lr": 0.1}, images_per_s=10.0)
    assert terminal.left < 0
