"""The metrics of a run as lines of JSON, as TensorBoard events and, if wanted, at Weights & Biases."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from convert.files import writing
from crossvit_jax.files import check_open, read_regular
from train.run.best_effort import BestEffort

FILE = "metrics.jsonl"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl` so far. What is no line of a run, as in a damaged file, is left out.

    Raises OSError if there is no such file.
    """
    lines = map(_line, read_regular(folder / FILE).splitlines())
    return [line for line in lines if line is not None]


def _line(text: bytes) -> dict[str, Any] | None:
    """None for what is no line of a run: `step` and `epoch`, which are whole numbers, and other finite numbers."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):  # digits without end and brackets without end are among the former
        return None
    if not isinstance(line, dict) or not all(is_whole(line.get(name)) for name in ("step", "epoch")):
        return None
    return line if all(is_number(value) for value in line.values()) else None


def is_whole(value: object) -> bool:
    """Whether it is a count of steps or epochs."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def is_number(value: object) -> bool:
    """Whether it is a number that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


class MetricsLog:
    """Writes `metrics.jsonl` and TensorBoard events into a folder. Each line is on disk when `write` returns.

    What is measured in seconds goes to TensorBoard and Weights & Biases only: the lines of a run depend on nothing but
    its settings, so that an interrupted and resumed run has the very file of an uninterrupted one.
    """

    def __init__(
        self,
        folder: Path,
        *,
        position: int = 0,
        step: int = 0,
        wandb_run: Any = None,
        say: Callable[[str], None] = print,
    ):
        """Go on after `position` bytes and `step` training steps; what was written later is dropped.

        Args:
            say: told one line if what was written before is not there, and if TensorBoard's events or Weights & Biases
                fail; the lines are written all the same.

        Raises OSError if the file cannot be written.
        """
        self._lines = _open_to_write(folder / FILE)
        for note in _go_on_after(self._lines, position):
            say(f"note: {folder / FILE}: {note}")
        self._folder, self._step = folder, step
        self._wandb = wandb_run
        self._to_tensorboard, self._to_wandb = BestEffort("TensorBoard", say), BestEffort("Weights & Biases", say)

    @cached_property
    def _events(self) -> "_Events":
        return _Events(self._folder, step=self._step)

    @property
    def position(self) -> int:
        """Bytes written so far; they have reached the disk."""
        os.fsync(self._lines.fileno())
        return self._lines.tell()

    def write(self, *, step: int, epoch: int, values: dict[str, float], speed: float | None = None) -> None:
        """One line: `step` (training steps done), `epoch` (epochs begun, from 1) and the values by name.

        Names are `train/loss`, `eval/top1` and so on. Raises ValueError for NaN and infinity, which are no JSON, and
        NotWritten.

        Args:
            speed: images per second, told beside the line.
        """
        line: dict[str, Any] = {"step": step, "epoch": epoch, **values}
        text = json.dumps(line, allow_nan=False) + "\n"
        with writing(self._folder / FILE):
            self._lines.write(text.encode())
            self._lines.flush()
        told = values if speed is None else {**values, "train/images_per_s": speed}
        self._to_tensorboard(lambda: self._events.write(told, step))
        if self._wandb is not None:
            self._to_wandb(self._wandb.log, {"epoch": epoch, **told}, step=step)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what is left of a line that could not be written, which `write` has told
            self._lines.close()
        if "_events" in self.__dict__:
            self._to_tensorboard(self._events.close)
        if self._wandb is not None:
            self._to_wandb(self._wandb.finish)


def _open_to_write(path: Path) -> BinaryIO:
    """A regular file, also one that is not there yet; a named pipe is not waited for."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    try:
        check_open(descriptor, path)
        return open(descriptor, "r+b")
    except BaseException:
        os.close(descriptor)
        raise


def _go_on_after(file: BinaryIO, position: int) -> list[str]:
    """Drops what is behind a position, and goes to the end; returns what of the lines before it is lost, in words."""
    size = file.seek(0, os.SEEK_END)
    file.truncate(min(position, size))
    file.seek(0, os.SEEK_END)
    notes = []
    if size < position:
        notes.append(f"it has {size:,} bytes, and had {position:,} at the checkpoint: the lines between are lost")
    file.seek(0)
    lines = file.read().splitlines(keepends=True)
    damaged = sum(_line(line) is None for line in lines)
    if damaged:
        notes.append(
            f"{damaged} of its {len(lines)} lines are damaged: they are kept as they are, and drawn in no curve"
        )
    if lines and not lines[-1].endswith(b"\n"):
        file.write(b"\n")  # or the next line would be damaged, too
    file.seek(0, os.SEEK_END)
    return notes


class _Events:
    """A file of TensorBoard's, written by the thread that calls.

    tensorboardX has a thread of its own for it: when that dies of a full disk, whoever writes more waits for ever.
    """

    def __init__(self, folder: Path, *, step: int):
        """Events of later steps than `step`, if it is not 0, that lie in the folder from before count no more."""
        # its package imports torch, which takes a second: not before anything is written
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        self._file = EventsWriter(str(folder / "events"))
        if step:
            self._add(step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, values: Mapping[str, float], step: int) -> None:
        from tensorboardX.summary import scalar

        for name, value in values.items():
            self._add(step, summary=scalar(name, value))
        self._file.flush()

    def _add(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._file.write_event(Event(step=step, wall_time=time.time(), **content))

    def close(self) -> None:
        self._file.close()


class NoLog:
    """What a process has that leaves the writing to another: takes everything, keeps nothing."""

    position = 0

    def write(self, **_: Any) -> None: ...

    def close(self) -> None: ...
