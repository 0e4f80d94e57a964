"""What is shown of a run without a terminal, and that it goes on when nobody can see it any more."""

import io
import re
from contextlib import closing
from datetime import datetime

import pytest

from train.run import progress
from train.run.meter import Meter
from train.run.metrics_log import NoLog
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


def test_an_epoch_that_was_trained_elsewhere_has_no_speed(capsys):
    metric = Metric("top1", "top-1", "%", "max")
    values = {"eval/loss": 1.0, "eval/top1": 50.0, "train/lr": 0.1}
    with closing(Progress((metric,), metric, epochs=2, steps_per_epoch=4, done=4)) as shown:
        shown.epoch(epoch=1, step=4, values=values, images_per_s=0.0)
    expected = "epoch 1/2 | held-out loss 1.000, top-1 50.00 % | lr 1.00e-01\n"
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize("silent", [False, True])
def test_without_a_terminal_there_is_a_line_with_the_time_every_few_steps(monkeypatch, capsys, silent):
    monkeypatch.setattr(progress.time, "perf_counter", iter(range(0, 10_000, 10)).__next__)
    metric = Metric("top1", "top-1", "%", "max")
    log, step = NoLog(), {"loss": 1.0, "top1": 0.5, "bad": 0}
    with closing(Progress((metric,), metric, epochs=2, steps_per_epoch=4, silent=silent)) as shown:
        how = {"metrics": (metric,), "step": 0, "batch_size": 8, "log_every": 3, "learning_rate": lambda step: 0.1}
        meter = Meter(log, shown, **how)
        for epoch in (1, 2):
            meter.begin(epoch)
            for place in range(4):
                meter.add(step | {"loss": float(4 * epoch + place)})
            meter.finish()
    lines = capsys.readouterr().out.splitlines()
    if silent:
        assert lines == []
        return
    # steps 1 to 3, and of the second epoch 5 and 6
    parts = [re.fullmatch(r"(.{19}) (step .*) \| (\d+) images/s \| (\d+:)?\d\d:\d\d left", line) for line in lines]
    assert [part[2] for part in parts] == [
        f"step {number}/8, epoch {epoch} | loss {loss} | top-1 50.0 % | lr 1.00e-01"
        for number, epoch, loss in ((3, 1, "5.000"), (6, 2, "8.500"))
    ]
    for part in parts:
        assert abs(datetime.now() - datetime.strptime(part[1], "%Y-%m-%d %H:%M:%S")).total_seconds() < 60
