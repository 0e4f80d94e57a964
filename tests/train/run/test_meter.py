"""The means of steps, and when numbers end a run: in float16 a step may be skipped."""

import math
from contextlib import closing

import pytest

from train.run import meter
from train.run.meter import Meter, TrainingFailed
from train.run.progress import Progress
from train.tasks.task import Metric

_METRIC = Metric("top1", "top-1", "%", "max")
_GOOD = {"loss": 2.0, "top1": 0.5, "bad": 1, "loss_scale": 4.0, "skipped": 0}


class _Log:
    """Keeps what is written."""

    def __init__(self):
        self.lines = []

    def write(self, *, values, **_):
        self.lines.append(values)


def _logged(steps, log_every=50):
    """The lines of an epoch of such steps, and what it comes to."""
    log = _Log()
    with closing(Progress((_METRIC,), _METRIC, epochs=1, steps_per_epoch=len(steps), silent=True)) as shown:
        how = {"metrics": (_METRIC,), "step": 0, "batch_size": 8, "log_every": log_every}
        meter = Meter(log, shown, learning_rate=lambda step: 0.1, **how)
        meter.begin(1)
        for step in steps:
            meter.add(step)
        values, _ = meter.finish()
    return log.lines, values


def test_skipped_steps_are_counted_and_an_infinite_loss_has_no_part_in_the_means():
    overflown = _GOOD | {"loss": math.inf, "skipped": 1}
    finite = _GOOD | {"loss": 4.0, "skipped": 1, "loss_scale": 2.0}  # its gradient was not
    (line,), values = _logged([_GOOD, overflown, finite])
    assert line == values
    expected = {"train/loss": 3.0, "train/top1": 50.0, "train/bad_images": 3, "train/lr": 0.1}
    assert values == expected | {"train/skipped": 2, "train/loss_scale": 2.0}


def test_steps_that_were_all_skipped_are_logged_without_a_loss():
    lines, _ = _logged([_GOOD | {"loss": math.nan, "skipped": 1}] * 3, log_every=2)
    assert [line["train/skipped"] for line in lines] == [2, 1]
    assert not any("train/loss" in line for line in lines)


def test_the_speed_is_that_of_the_epoch_without_what_its_first_step_waited_for(monkeypatch):
    """Metrics are fetched late, the last ones of an epoch all at once: the time between them is no measure."""
    now, told = [0.0], []
    monkeypatch.setattr(meter.time, "perf_counter", lambda: now[0])
    log = _Log()
    log.write = lambda *, speed, **_: told.append(speed)
    with closing(Progress((_METRIC,), _METRIC, epochs=1, steps_per_epoch=5, silent=True)) as shown:
        how = {"metrics": (_METRIC,), "step": 0, "batch_size": 8, "log_every": 1}
        taken = Meter(log, shown, learning_rate=lambda step: 0.1, **how)
        taken.begin(1)
        now[0] = 100.0  # compiled
        taken.start_clock()
        for _ in range(5):
            taken.add(_GOOD)
            now[0] += 0.5
        now[0] -= 0.5
        _, images_per_s = taken.finish()
    assert images_per_s == told[-1] == 16
    assert told == sorted(told) and len(told) == 5


def test_a_step_without_a_scale_tells_none():
    (line,), _ = _logged([{"loss": 2.0, "top1": 0.5, "bad": 0}])
    assert line == {"train/loss": 2.0, "train/top1": 50.0, "train/bad_images": 0, "train/lr": 0.1}


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"loss": math.nan, "top1": 0, "bad": 0}, r"^the loss became nan in step 1 \(epoch 1, learning rate 0.1\); "),
        (_GOOD | {"loss": math.inf}, "^the loss became inf"),  # and was not skipped
        (_GOOD | {"skipped": 1, "loss_scale": 0.5}, "^gradients are infinite or NaN in step 1 .*scale of 0.5"),
    ],
)
def test_numbers_that_no_scale_can_help_end_the_run(step, message):
    with pytest.raises(TrainingFailed, match=message):
        _logged([step])
