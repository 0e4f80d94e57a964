"""What is written about a run while it goes on."""

import json
from contextlib import closing

import pytest
from tensorboardX.proto.event_pb2 import Event

from train.run.metrics_log import MetricsLog, read_metrics


def _events(file):
    """(step, name, value) of every scalar in a TensorBoard file: records of length, checksum, event, checksum."""
    content, at, scalars = file.read_bytes(), 0, []
    while at < len(content):
        length = int.from_bytes(content[at : at + 8], "little")
        event = Event.FromString(content[at + 12 : at + 12 + length])
        scalars += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        at += 12 + length + 4
    return scalars


def test_each_line_is_on_disk_at_once_as_json_and_as_tensorboard_event(tmp_path):
    with closing(MetricsLog(tmp_path)) as log:
        log.write(step=3, epoch=1, values={"train/loss": 2.5, "train/lr": 0.25})
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == [{"step": 3, "epoch": 1, "train/loss": 2.5, "train/lr": 0.25}]
        log.write(step=6, epoch=2, values={"eval/top1": 50.0})
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    (file,) = tmp_path.glob("events.*")
    assert _events(file) == [(3, "train/loss", 2.5), (3, "train/lr", 0.25), (6, "eval/top1", 50.0)]


def test_nan_is_refused(tmp_path):
    with closing(MetricsLog(tmp_path)) as log, pytest.raises(ValueError, match="JSON"):
        log.write(step=1, epoch=1, values={"train/loss": float("nan")})


def test_a_resumed_log_drops_what_came_after_the_checkpoint(tmp_path):
    with closing(MetricsLog(tmp_path)) as log:
        log.write(step=1, epoch=1, values={"train/loss": 3.0})
        position = log.position
        log.write(step=2, epoch=1, values={"train/loss": 2.0})
    with closing(MetricsLog(tmp_path, position=position, step=1)) as log:
        log.write(step=2, epoch=1, values={"train/loss": 1.0})
    assert [line["train/loss"] for line in read_metrics(tmp_path)] == [3.0, 1.0]


def test_speed_is_told_beside_the_lines(tmp_path):
    with closing(MetricsLog(tmp_path)) as log:
        log.write(step=1, epoch=1, values={"train/loss": 3.0}, speed=120.0)
    assert read_metrics(tmp_path) == [{"step": 1, "epoch": 1, "train/loss": 3.0}]
    (file,) = tmp_path.glob("events.*")
    assert _events(file) == [(1, "train/loss", 3.0), (1, "train/images_per_s", 120.0)]


def test_weights_and_biases_gets_the_same(tmp_path):
    class Run:
        told, finished = [], False

        def log(self, values, step):
            self.told.append((step, values))

        def finish(self):
            self.finished = True

    run = Run()
    with closing(MetricsLog(tmp_path, wandb_run=run)) as log:
        log.write(step=4, epoch=2, values={"eval/top1": 50.0})
    assert run.told == [(4, {"epoch": 2, "eval/top1": 50.0})]
    assert run.finished
