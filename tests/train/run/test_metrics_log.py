"""What is written about a run while it goes on."""

import json
import os
import resource
import signal
from contextlib import closing

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from convert.files import NotWritten
from train.run.metrics_log import MetricsLog, read_metrics


def _events(file):
    """Every event in a TensorBoard file: records of length, checksum, event, checksum."""
    content, at = file.read_bytes(), 0
    while at < len(content):
        length = int.from_bytes(content[at : at + 8], "little")
        yield Event.FromString(content[at + 12 : at + 12 + length])
        at += 12 + length + 4


def _scalars(file):
    """(step, name, value) of every scalar."""
    return [(event.step, value.tag, value.simple_value) for event in _events(file) for value in event.summary.value]


def test_each_line_is_on_disk_at_once_as_json_and_as_tensorboard_event(tmp_path):
    with closing(MetricsLog(tmp_path)) as log:
        log.write(step=3, epoch=1, values={"train/loss": 2.5, "train/lr": 0.25})
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == [{"step": 3, "epoch": 1, "train/loss": 2.5, "train/lr": 0.25}]
        log.write(step=6, epoch=2, values={"eval/top1": 50.0})
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    (file,) = tmp_path.glob("events.*")
    assert _scalars(file) == [(3, "train/loss", 2.5), (3, "train/lr", 0.25), (6, "eval/top1", 50.0)]


def test_a_line_that_finds_no_room_is_told_with_its_file_and_once(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with closing(MetricsLog(tmp_path)) as log:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))  # as a full disk
            with pytest.raises(NotWritten, match=r"metrics\.jsonl could not be written: File too large"):
                log.write(step=1, epoch=1, values={"train/loss": 2.5})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


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
    assert _scalars(file) == [(1, "train/loss", 3.0), (1, "train/images_per_s", 120.0)]


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


class _Broken:
    def __init__(self, *_):
        self.calls = 0

    def log(self, *_, **__):
        self.calls += 1
        raise RuntimeError("no network\nreally")

    def finish(self):
        raise AssertionError("it was to be left alone")


def test_what_fails_beside_the_lines_is_one_note_each_and_they_are_whole(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tensorboardX.record_writer.RecordWriter.write", full)
    told, run = [], _Broken()
    with closing(MetricsLog(tmp_path, wandb_run=run, say=told.append)) as log:
        for step in range(1, 30):
            log.write(step=step, epoch=1, values={"train/loss": 3.0})
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 30))
    assert told == [
        "note: TensorBoard: [Errno 28] No space left on device; left out from now on",
        "note: Weights & Biases: no network; left out from now on",
    ]
    assert run.calls == 1


def test_a_resumed_log_tells_tensorboard_which_events_count_no_more(tmp_path):
    with closing(MetricsLog(tmp_path, step=7)) as log:
        log.write(step=8, epoch=1, values={"train/loss": 3.0})
    (file,) = tmp_path.glob("events.*")
    events = list(_events(file))
    assert events[0].file_version == "brain.Event:2"
    assert [(event.step, event.session_log.status) for event in events[1:]] == [(8, SessionLog.START), (8, 0)]
    assert all(event.wall_time > 0 for event in events)


def test_a_damaged_log_is_told_and_what_can_be_read_of_it_goes_on(tmp_path):
    with closing(MetricsLog(tmp_path)) as log:
        for step in (1, 2, 3):
            log.write(step=step, epoch=1, values={"train/loss": 3.0})
        position = log.position
    file, told = tmp_path / "metrics.jsonl", []
    whole = file.read_bytes()
    for damaged, lost, left in (
        (b"", "it has 0 bytes, and had", [4]),
        (whole[:-20], "the lines between are lost", [1, 2, 4]),
        (whole.replace(b'"step": 2', b'"step": \xff'), "1 of its 3 lines are damaged", [1, 3, 4]),
        (b"\0" * len(whole), "1 of its 1 lines are damaged", [4]),
        (b'{"step": 1, "epoch": 1, "x": 1e999}\n' + b"[" * 100_000, "2 of its 2 lines are damaged", [4]),
    ):
        file.write_bytes(damaged)
        told.clear()
        with closing(MetricsLog(tmp_path, position=max(position, len(damaged)), step=3, say=told.append)) as log:
            log.write(step=4, epoch=1, values={"train/loss": 2.0})
            assert log.position == file.stat().st_size
        assert lost in "; ".join(told)
        assert [line["step"] for line in read_metrics(tmp_path)] == left


def test_a_pipe_in_place_of_the_log_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(OSError, match="a named pipe"):
        MetricsLog(tmp_path)
    with pytest.raises(OSError, match="a named pipe"):
        read_metrics(tmp_path)
