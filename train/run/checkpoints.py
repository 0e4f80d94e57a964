"""The checkpoints of a run: written while training goes on, the last two and the best kept, damage noticed.

A checkpoint has the training state, what the loop must remember beside it (`RunState`), and the model's description, so
that every one of them is a SOURCE of `python -m convert`.
"""

import contextlib
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import PreservationContext

from convert import metadata
from convert.errors import one_line, quiet_storage, silence_storage
from convert.formats import fingerprint
from train.run.folder import CHECKPOINTS, CheckpointError
from train.run.run_state import RunState

State = dict[str, Any]  # what a step changes: arrays by name, see `train.optim.state`

_STATE, _PROGRESS = "state", fingerprint.RUN_ITEM
_KEPT = 2


class Checkpoints:
    """The checkpoints in a run's folder. All processes of a run make one, and call it at the same steps."""

    def __init__(self, folder: Path, *, description: dict, say: Callable[[str], None]):
        """`description` is that of `convert.metadata`; `say` shows the user a line."""
        self._folder = (folder / CHECKPOINTS).absolute()
        self._description, self._say = description, say
        self.best_step: int | None = None  # whose checkpoint is kept as the best: known only after it was saved
        self._last_whole: int | None = None
        self._saving: int | None = None  # the step that is being written in the background
        self._fingerprint = jax.jit(fingerprint.marks_on_devices, static_argnames="version")
        options = ocp.CheckpointManagerOptions(preservation_policy=self, enable_async_checkpointing=True)
        self._failed = False  # whether anything could not be written
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(quiet_storage())  # as long as its threads write
                self._manager = ocp.CheckpointManager(self._folder, options=options)
                self._open = stack.pop_all()
        except OSError as error:
            raise CheckpointError(f"cannot keep checkpoints in {self._folder}: {one_line(error)}") from error

    def should_preserve(self, checkpoints: Sequence[Any], *, context: PreservationContext) -> list[bool]:
        """Orbax's question which checkpoints to keep: the latest and the best."""
        recent = {info.step for info in checkpoints[-_KEPT:]}
        return [info.step in recent or info.step == self.best_step for info in checkpoints]

    def save(self, state: State, run: RunState, about: dict[str, Any]) -> None:
        """Write a checkpoint of the step `run.step`; returns when the state may change, and goes on in the background.

        Does nothing if there is one of this step: it can only be the same. Raises CheckpointError, also for the
        checkpoint before this one.

        Args:
            about: the run in JSON values, for people who look into a checkpoint.
        """
        step = run.step
        if step in self._manager.all_steps():
            return
        self._finish()
        items = {
            _STATE: ocp.args.StandardSave(state),
            _PROGRESS: ocp.args.JsonSave(
                fingerprint.sealed(self._marks(state), {**run.to_json(), "run": about}, self._description)
            ),
            metadata.KEY: ocp.args.JsonSave(self._description),
        }
        self._attempt(step, lambda: self._manager.save(step, args=ocp.args.Composite(**items), force=True))
        self._saving = step

    def check(self) -> None:
        """Raises CheckpointError if what goes on in the background has failed. To be called with every step."""
        if self._saving is not None and not self._manager.is_saving_in_progress():
            self._finish()

    def wait(self) -> None:
        """Return when the last checkpoint is whole on the disk, and no other than those to keep are there.

        Raises CheckpointError if it cannot be written.
        """
        self._finish()
        steps = sorted(self._manager.all_steps())
        for step in {*steps[:-_KEPT]} - {self.best_step}:
            self._manager.delete(step)

    def close(self) -> None:
        """Wait for what is being written, and end the threads. What went wrong there is told by `save` and `wait`."""
        with self._open:
            try:
                self._manager.close()
            except Exception:
                self._failed = True
        if self._failed:
            silence_storage()

    def restore(self, shapes: State) -> tuple[State, RunState] | None:
        """The newest whole checkpoint and what the run remembered; None if there is none.

        A damaged one is told, and the one before is taken; when that is whole, the other is renamed to `STEP.damaged`,
        or `STEP.damaged-2` where there is one.

        Args:
            shapes: the state with `ShapeDtypeStruct`s that carry shardings: those of this run, not of the one before.

        Raises:
            CheckpointError: there are checkpoints, and all are damaged.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for place, step in enumerate(steps):
            try:
                restored = self._read(step, shapes)
            except MemoryError:
                raise
            except Exception as error:  # Orbax and tensorstore raise whatever the damage leads to
                if "RESOURCE_EXHAUSTED" in str(error):  # it is the device that is too small
                    raise
                self._say(f"checkpoint {self._folder / str(step)} is damaged ({one_line(error)[:200]})")
                continue
            for damaged in steps[:place]:
                self._put_aside(damaged)
            self._last_whole = step
            return restored
        if steps:
            raise CheckpointError(f"none of the checkpoints in {self._folder} can be read")
        return None

    def _read(self, step: int, shapes: State) -> tuple[State, RunState]:
        items = {_STATE: ocp.args.StandardRestore(shapes), _PROGRESS: ocp.args.JsonRestore()}
        items[metadata.KEY] = ocp.args.JsonRestore()
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        state, sealed = restored[_STATE], restored[_PROGRESS]
        progress = fingerprint.open_seal(sealed, restored[metadata.KEY])
        if not fingerprint.is_of(sealed, self._marks(state, fingerprint.version_of(sealed))):
            raise ValueError("its content is not what was written")
        return state, RunState.from_json(progress)

    def _marks(self, state: State, version: int = fingerprint.VERSION) -> dict[str, int]:
        marks = jax.device_get(self._fingerprint(state, version=version)).tolist()
        return dict(zip(fingerprint.paths(state), marks, strict=True))

    def _put_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            number = itertools.count(2)  # it may be damaged again, after it was written anew
            aside = self._folder / f"{step}.damaged"
            while aside.exists():
                aside = self._folder / f"{step}.damaged-{next(number)}"
            (self._folder / str(step)).rename(aside)
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices(f"checkpoint {step} put aside")
        self._manager.reload()

    def _finish(self) -> None:
        step, self._saving = self._saving, None
        if step is not None:
            self._attempt(step, self._manager.wait_until_finished)
            self._last_whole = step

    def _attempt(self, step: int, write: Callable[[], Any]) -> None:
        try:
            write()
        except Exception as error:  # besides OSError, whatever Orbax and tensorstore raise
            self._failed = True
            reason = "no space left on device" if "No space left" in str(error) else one_line(error)[:300]
            last = "none is whole" if self._last_whole is None else f"the last whole one is of step {self._last_whole}"
            raise CheckpointError(
                f"a checkpoint could not be written in {self._folder} (step {step}): {reason}; {last}"
            ) from error
        whole = [known for known in self._manager.all_steps() if known != step]
        self._last_whole = max(whole, default=None)
