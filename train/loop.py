"""The story of a run: data, model, optimiser, epochs of steps and evaluations, checkpoints, the weights at the end."""

import functools
import gc
import importlib
import itertools
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from convert.errors import ConversionError, SettingsError, UserError
from convert.formats.run_folder import AVERAGE, BEST, CHECKPOINTS, CURVES, WEIGHTS, read_state
from convert.image_files import accepted_unreadable
from convert.streams import tell
from convert.tree import nest
from train.data.bad_images import BadImages, too_many_error, unreadable
from train.data.sources import DataError, WorkersFailed
from train.data.tagged_images import TaggedImages
from train.devices.hosts import is_main
from train.devices.lost_hosts import HostLost, lost_hosts_explained
from train.devices.memory import available_memory, check_fits, memory_errors_explained
from train.devices.mesh import fetch
from train.inference.model import at_once, forward
from train.job import Job
from train.optim.carried import carry
from train.optim.programs import Plan, Programs
from train.optim.schedule import learning_rate
from train.optim.state import State
from train.pictures.curves import draw_curves
from train.run.best_effort import BestEffort
from train.run.folder import claim_run_folder, newest_checkpoint, read_run, write_config
from train.run.interruption import Interrupted, Interruption
from train.run.meter import Meter, TrainingFailed
from train.run.metrics_log import MetricsLog, NoLog, read_metrics
from train.run.progress import Progress
from train.run.run_state import Best, RunState
from train.tasks.task import Metric, Scores, choosing_metric

if TYPE_CHECKING:
    from train.run.checkpoints import Checkpoints

CURVES_FILE, BATCH_FILE, OUTPUTS_FILE = CURVES, "train_batch.png", "predictions.png"
_DRAWN_EVERY_S = 60.0
_LOOKED_AT = 2000  # held-out images, before the first epoch
_DRAWN_IMAGES = 12


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    folder: Path
    metrics: tuple[Metric, ...]
    final: dict[str, float]  # the last evaluation: eval/loss and the task's metrics
    best: Best | None  # evaluation
    seconds: float

    def summary(self) -> str:
        """A few lines for the user."""
        minutes, seconds = divmod(round(self.seconds), 60)
        choosing, weights = choosing_metric(self.metrics), f"weights {self.folder / WEIGHTS}"
        scores = f"held-out {self._scores('eval/')}"
        if "eval/ema_loss" in self.final:
            scores += f"; average of the weights {self._scores('eval/ema_')}"
            weights += f", their average {self.folder / AVERAGE}"
        weights += f", of the best evaluation {self.folder / BEST}"
        best = ""
        if self.best:
            whose = ", of the average" if self.best.kind == "ema" else ""
            best = f" (best {choosing.shown(self.best.value)}, epoch {self.best.epoch}{whose})"
        return f"{scores}{best}; {minutes} min {seconds:02} s\nrun folder {self.folder}, {weights}"

    def _scores(self, prefix: str) -> str:
        """The metrics of the last evaluation, and the loss."""
        names = {metric: prefix + metric.name for metric in self.metrics}
        told = [metric.shown(self.final[name]) for metric, name in names.items() if name in self.final]
        return ", ".join([*told, f"loss {self.final[f'{prefix}loss']:.4f}"])


def train(job: Job) -> Result:
    """Run a job to its end, from where an earlier run of it stopped.

    Raises TrainingFailed if the loss is not finite, Interrupted after a signal that asks for it, CheckpointError,
    SettingsError if the program does not fit into memory or the folder is taken, and what the data raises.
    """
    start = time.perf_counter()
    config, mesh = job.config, job.mesh

    with ExitStack() as stack:
        interruption = stack.enter_context(Interruption())
        stack.enter_context(memory_errors_explained(config, mesh))

        # --- the run's folder: taken now, written to when nothing can go wrong any more ---
        folder = _claim_folder(job, stack)
        stack.enter_context(_told_how_to_go_on(folder))
        newest_step = newest_checkpoint(folder)
        _say(_headline(job, folder))

        # --- the programs that the devices run ---
        _say("compiling the training step …")
        # not while threads compile: Grain's imports, as they run, make those of all threads lazy, on which jax fails
        importlib.import_module("train.data.streams")
        initial = None if job.weights is None else nest(job.weights.tensors)
        plan = Plan(job.task, config, mesh, job.steps_per_epoch, job.eval_batch_size)
        programs = stack.enter_context(closing(Programs(plan, new_state=newest_step == 0, params=initial)))

        # --- meanwhile the data; Orbax takes long to import ---
        from train.run.checkpoints import Checkpoints

        first_step = newest_step if job.carried is None else job.carried.epochs * job.steps_per_epoch
        run = stack.enter_context(closing(_Run(job, folder, programs, interruption, step=first_step, start=start)))
        if newest_step == 0:
            run.check_held_out()  # before the programs are waited for
        memory, available = programs.memory, available_memory(mesh)
        check_fits(memory, available, config, mesh)
        _say(memory.describe(available))

        # --- the state that an earlier run left, or a new one ---
        checkpoints = stack.enter_context(closing(Checkpoints(folder, description=job.described["model"], say=_say)))
        if is_main() and newest_step == 0:
            write_config(folder, job.described)
        run.restore_or_begin(checkpoints)

        # --- epochs ---
        with run.saved_where_data_end():
            for epoch in run.epochs_left():
                values, images_per_s = run.train_epoch(epoch)
                if epoch % config.eval_every == 0 or epoch == config.epochs:
                    values |= run.evaluate(epoch)
                run.tell(epoch, values, images_per_s)
                if run.is_out_of_patience(epoch):
                    break

        # --- the weights, before anything that is only looked at ---
        checkpoints.wait()
        for name, file in (("params", WEIGHTS), ("ema", AVERAGE)):
            if name in run.state:
                params = fetch(_weights(job, run.state, name), mesh)
                if is_main():
                    job.task.save(params, folder / file)
        run.save_best()
        run.draw()
    return Result(folder, job.task.metrics, run.final, run.best, time.perf_counter() - start)


class _Run:
    """A run on its way: its data and its state, and all that is told and kept of it. Close it after use."""

    def __init__(
        self, job: Job, folder: Path, programs: Programs, interruption: Interruption, *, step: int, start: float
    ):
        """Begins to read the images that come after `step` steps."""
        self._job, self._folder, self._programs, self._interruption = job, folder, programs, interruption
        self._choosing = choosing_metric(job.task.metrics)
        self._bad_train = BadImages(job.image_sets.train, _say)
        self._bad_held_out = BadImages(job.image_sets.held_out, _say)
        self._tagged = {"training": TaggedImages(), "held-out": TaggedImages()}  # until they are told
        self._start, self._first_step_done, self._drawn = start, False, time.perf_counter()
        self._pictures = {name: BestEffort(name, _say) for name in (CURVES_FILE, BATCH_FILE, OUTPUTS_FILE)}
        self._seen: tuple[Any, Any] | None = None  # some images of the last evaluation, and what came of them
        self._step = step
        self._open = ExitStack()
        self._train = self._open_train()
        self.final: dict[str, float] = {}  # the last evaluation

    def _open_train(self) -> Iterator[dict[str, Any]]:
        from train.data.streams import open_train_stream

        config, transform = self._job.config, self._job.task.transform(training=True)
        images, mesh = self._job.image_sets.train, self._job.mesh
        stream = open_train_stream(config, images, transform, mesh, start_step=self._step)
        return self._open.enter_context(closing(stream))

    @functools.cached_property
    def _held_out(self) -> Iterator[dict[str, Any]]:
        """The held-out images again and again, `job.eval_steps` batches each time; opened when it is first wanted."""
        from train.data.streams import open_eval_stream

        config, transform = self._job.config, self._job.task.transform(training=False)
        images, mesh = self._job.image_sets.held_out, self._job.mesh
        stream = open_eval_stream(config, images, transform, mesh, batch_size=self._job.eval_batch_size)
        return self._open.enter_context(closing(stream))

    def check_held_out(self) -> None:
        """Looks at the held-out images before anything is trained: at all of a small set, at some of a large one.

        Raises TooManyBadImages if more of them cannot be read than is accepted.
        """
        source, share = self._job.image_sets.held_out, self._job.config.max_bad_images
        count = min(len(source), _LOOKED_AT)
        places = np.linspace(0, len(source) - 1, count).astype(int)
        bad = unreadable(source, places, self._job.config.exif)
        self._bad_held_out.add(bad)
        accepted = accepted_unreadable(share, count)
        if count < len(source):  # of some: only what chance does not explain
            accepted += 4 * accepted**0.5
        if len(bad) > accepted:
            raise too_many_error(self._bad_held_out, len(bad), count, share)

    def restore_or_begin(self, checkpoints: "Checkpoints") -> None:
        """The state of the newest checkpoint that is whole, or a new one."""
        job, config = self._job, self._job.config
        self._checkpoints = checkpoints
        restored = checkpoints.restore(self._programs.state)
        self.state, remembered = restored or self._begin()
        self.best = remembered.best
        checkpoints.best_step = self.best and self.best.step
        if remembered.step != self._step:  # the newest checkpoint was damaged
            self._step = remembered.step
            self._train.close()
            self._train = self._open_train()
        if job.resumed:
            _say(f"continued after step {self._step} of {config.epochs * job.steps_per_epoch}")
        log = _open_log(job, self._folder, position=remembered.log_bytes, step=self._step)
        self._log = self._open.enter_context(closing(log))
        self._shown = Progress(
            job.task.metrics,
            self._choosing,
            epochs=config.epochs,
            steps_per_epoch=job.steps_per_epoch,
            done=self._step,
            silent=not is_main(),
        )
        self._open.enter_context(closing(self._shown))
        self._meter = Meter(
            self._log,
            self._shown,
            metrics=job.task.metrics,
            step=self._step,
            batch_size=config.batch_size,
            log_every=config.log_every,
            learning_rate=lambda step: learning_rate(config, step, steps_per_epoch=job.steps_per_epoch),
            check_bad=lambda count: _check_bad(job, self._bad_train, count),
            state=remembered.meter,
        )
        if job.carried is not None:
            self._checkpoints.save(self.state, remembered, job.described)  # from now on the run is in its folder
        self._interruption.can_save = True

    def _begin(self) -> tuple[State, RunState]:
        """A new state, or the one that another program has trained."""
        state, carried = self._programs.new_state(), self._job.carried
        if carried is None:
            return state, RunState()
        return carry(state, carried, step=self._step), RunState(self._step, lr=carried.rule.lr)

    def epochs_left(self) -> range:
        """From 1; also the epoch whose last step is done, if its evaluation is not."""
        return range(max(1, -(-self._step // self._job.steps_per_epoch)), self._job.config.epochs + 1)

    def train_epoch(self, epoch: int) -> tuple[dict[str, float], float]:
        """The steps of an epoch that are left; the epoch's means by their names in the log, and images/s."""
        job, programs = self._job, self._programs
        self._meter.begin(epoch)
        while self._step < epoch * job.steps_per_epoch:
            batch = next(self._train)
            self._bad_train.add(batch.pop("bad_indices"))
            self._count_tagged("training", batch.pop("tagged"))
            if programs.augment is not None:
                batch = programs.augment(batch, self._step)
            self.state, metrics = programs.step_after(self._step)(self.state, batch)
            self._step += 1
            if not self._first_step_done:
                self._after_the_first_step(metrics, batch)
            self._meter.add(metrics)
            self._checkpoints.check()
            due = self._step % job.config.checkpoint_every == 0 or self._step % job.steps_per_epoch == 0
            if due or self._interruption.wanted(self._step):
                self._save()
                self._stop_if_wanted()
        self._tell_tagged("training")
        return self._meter.finish()

    @contextmanager
    def saved_where_data_end(self) -> Iterator[None]:
        """Saves the steps that are done where worker processes die or the data set goes, which leave the state whole.

        Not with several processes: the others do not know of it, and all of them save together.
        """
        try:
            yield
        except (WorkersFailed, DataError) as error:
            if self._step == 0 or jax.process_count() > 1:
                raise
            try:
                self._save()
                self._checkpoints.wait()
            except UserError:  # a full disk, say: what came first is told
                raise error from None
            raise type(error)(f"{error}; saved after step {self._step}") from error

    def _after_the_first_step(self, metrics: Any, batch: dict[str, Any]) -> None:
        jax.block_until_ready(metrics)
        _say(f"the first step was done after {time.perf_counter() - self._start:.1f} s")
        self._first_step_done = True
        self._meter.start_clock()
        gc.enable()  # see train.main
        if self._step == 1 and jax.process_count() == 1:
            draw, picture = self._job.task.draw_batch, self._folder / BATCH_FILE
            self._pictures[BATCH_FILE](lambda: draw(jax.device_get(_some(batch)), picture))
        _ = self._held_out  # not before: its workers would take the cores from what the first step waits for

    def evaluate(self, epoch: int) -> dict[str, float]:
        """Evaluates the weights and their moving average on the held-out images, and writes it into the log."""
        job, self.final = self._job, {}
        for name, weights in (("", "params"), ("ema_", "ema")):
            if weights in self.state:
                values = self._scores(_weights(job, self.state, weights)).values()  # the last ones are drawn, too
                images = int(values.pop("images"))
                if not images:
                    raise TrainingFailed("none of the held-out images can be read")
                for metric, value in values.items():
                    if not math.isfinite(value):
                        raise TrainingFailed(f"the held-out {metric} became {value} in epoch {epoch}")
                self.final |= {f"eval/{name}{metric}": value for metric, value in values.items()}
        self.final["eval/bad_images"] = len(job.image_sets.held_out) - images
        _check_bad(job, self._bad_held_out, self.final["eval/bad_images"], held_out=True)
        self._log.write(step=self._step, epoch=epoch, values=self.final)
        self._keep_if_best(epoch)
        return self.final

    def _scores(self, params: Any) -> Scores:
        scores = self._job.task.scores(self._job.image_sets.held_out)
        batches = itertools.islice(self._watched(self._held_out), self._job.eval_steps)
        seen = []  # of the first batch

        def step(batch: dict[str, Any]) -> Any:
            if not seen and jax.process_count() == 1:
                seen.append(_some(batch))
            return self._programs.eval_step(params, batch)

        for outputs in forward(step, batches):
            scores.add(outputs)
            if len(seen) == 1:
                seen.append(_some(at_once(outputs)))
        self._seen = jax.device_get(tuple(seen)) or None
        self._tell_tagged("held-out")
        return scores

    def _watched(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The batches of an evaluation, which can be broken off."""
        for batch in batches:
            self._stop_if_wanted()
            self._bad_held_out.add(batch.pop("bad_indices"))
            self._count_tagged("held-out", batch.pop("tagged"))
            yield batch

    def _count_tagged(self, kind: str, tagged: np.ndarray) -> None:
        if kind in self._tagged:
            self._tagged[kind].add(tagged)

    def _tell_tagged(self, kind: str) -> None:
        """After the first pass over the images of a kind."""
        counted = self._tagged.pop(kind, None)
        note = counted and counted.told(self._job.config.exif, kind, why="as timm does; --exif apply turns them")
        if note:
            _say(f"note: {note}")

    def _keep_if_best(self, epoch: int) -> None:
        name, larger = self._choosing.name, self._choosing.better == "max"
        names = {"ema": f"eval/ema_{name}", "params": f"eval/{name}"}  # of equal ones the average counts
        scored = {kind: self.final[name] for kind, name in names.items() if name in self.final}
        if not scored:  # such as AP where no held-out picture that can be read has a box
            return
        kind = (max if larger else min)(scored, key=scored.get)
        value = scored[kind]
        if self.best is None or (value > self.best.value if larger else value < self.best.value):
            self.best = Best(value, epoch, self._step, kind)
            self._checkpoints.best_step = self._step

    def is_out_of_patience(self, epoch: int) -> bool:
        """Whether the run ends with this epoch, since the best evaluation was too long ago; and says so."""
        patience = self._job.config.patience
        if patience is None or self.best is None or epoch - self.best.epoch < patience:
            return False
        if epoch < self._job.config.epochs:
            _say(f"stopped after epoch {epoch}: no evaluation was better for {epoch - self.best.epoch} epochs")
        return True

    def save_best(self) -> None:
        """Writes the weights of the best evaluation, the raw ones or their average, as a file of their own."""
        best = self.best
        if best is None:
            return
        kind = best.kind or ("ema" if "ema" in self.state else "params")
        if best.step == self._step:
            params = fetch(_weights(self._job, self.state, kind), self._job.mesh)
        elif is_main():
            try:
                keys = ["extra"] if kind == "params" and hasattr(self._job.task, "published") else [kind]
                kept = read_state(self._folder / CHECKPOINTS / str(best.step), keys)
                params = _weights(self._job, kept, kind)
            except ConversionError as error:
                _say(f"note: {BEST} is left out: {error}")
                return
        if is_main():
            what = "the average of the weights" if kind == "ema" else "the weights"
            origin = f"{what} after epoch {best.epoch}, held-out {self._choosing.shown(best.value)}"
            self._job.task.save(params, self._folder / BEST, origin=origin)

    def tell(self, epoch: int, values: dict[str, float], images_per_s: float) -> None:
        """A line about an epoch, and from time to time the curves."""
        self._shown.epoch(epoch=epoch, step=self._step, values=values, images_per_s=images_per_s)
        last = epoch == self._job.config.epochs  # after which weights are written first
        if not last and time.perf_counter() - self._drawn > _DRAWN_EVERY_S:
            self.draw()

    def draw(self) -> None:
        """The curves so far, and some held-out images with what the last evaluation made of them."""
        if is_main():
            self._pictures[CURVES_FILE](self._draw_curves)
            if self._seen is not None:
                self._pictures[OUTPUTS_FILE](self._job.task.draw_outputs, *self._seen, self._folder / OUTPUTS_FILE)
            self._drawn = time.perf_counter()

    def _draw_curves(self) -> None:
        draw_curves(read_metrics(self._folder), self._job.task.metrics, self._folder / CURVES_FILE)

    def _save(self) -> None:
        meter = self._meter.catch_up()
        lr = learning_rate(self._job.config, self._step - 1, steps_per_epoch=self._job.steps_per_epoch)
        remembered = RunState(self._step, self._log.position, meter, self.best, lr)
        self._checkpoints.save(self.state, remembered, self._job.described)

    def _stop_if_wanted(self) -> None:
        if self._interruption.wanted(self._step):
            self._checkpoints.wait()
            raise Interrupted(
                f"saved after step {self._step} in {self._folder}; --resume {self._folder} goes on",
                self._interruption.status,
            )

    def close(self) -> None:
        self._open.close()


def _weights(job: Job, state: State, kind: str) -> Any:
    """The weights of a kind, `params` or `ema`, that are evaluated and left: see `Task.published`."""
    published = getattr(job.task, "published", None)
    return state[kind] if published is None or kind != "params" else published(state)


def _some(batch: Any) -> Any:
    """The first rows of what has rows, in memory of their own."""
    return jax.tree.map(lambda x: x[:_DRAWN_IMAGES].copy() if np.ndim(x) else x, batch)


def _check_bad(job: Job, bad_images: BadImages, count: int, *, held_out: bool = False) -> None:
    images = len(job.image_sets.held_out if held_out else job.image_sets.train)
    if count > accepted_unreadable(job.config.max_bad_images, images):
        raise too_many_error(bad_images, count, images, job.config.max_bad_images)


@contextmanager
def _told_how_to_go_on(folder: Path) -> Iterator[None]:
    """Where a worker process dies, as it may where memory ends, or another host, the message says what to do."""
    try:
        with lost_hosts_explained():
            yield
    except (WorkersFailed, HostLost) as error:
        if not read_run(str(folder)):
            raise
        workers = ", --workers 0 needs no worker processes" if isinstance(error, WorkersFailed) else ""
        raise type(error)(f"{error}; --resume {folder} goes on{workers}") from error


def _claim_folder(job: Job, stack: ExitStack) -> Path:
    """The run's folder, taken by the main process; the others go on when it is there."""
    folder = Path(job.config.output) if job.config.output else None
    if is_main():
        claim = stack.enter_context(closing(claim_run_folder(job.config)))
        folder = claim.folder
        if claim.note:
            _say(f"note: {claim.note}")
        if not job.resumed and read_run(str(folder)) is not None:
            raise SettingsError(f"another run was begun in {folder} meanwhile: name another --output")
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("run folder")
    return folder


def _open_log(job: Job, folder: Path, *, position: int, step: int) -> MetricsLog | NoLog:
    if not is_main():
        return NoLog()
    wandb_run = None
    if job.config.wandb is not None:
        wandb_run = BestEffort("Weights & Biases", _say)(_begin_wandb, job, folder)
    return MetricsLog(folder, position=position, step=step, wandb_run=wandb_run, say=_say)


def _begin_wandb(job: Job, folder: Path) -> Any:
    import wandb

    settings = {"config": job.described, "dir": str(folder), "name": folder.name}
    return wandb.init(project=job.config.wandb, id=job.described["id"], resume="allow", **settings)


def _say(line: str) -> None:
    if is_main():
        tell(line)


def _headline(job: Job, folder: Path) -> str:
    config, sets, devices = job.config, job.image_sets, job.mesh.devices
    start = f" from {config.init or config.resume}" if job.weights is not None else ""
    mesh = ", ".join(f"{axis} {size}" for axis, size in job.mesh.shape.items() if size > 1) or "1 device"
    return "\n".join(
        [
            f"{job.task.headline()}{start}, recipe {config.recipe}, batch {config.batch_size}, "
            f"peak learning rate {config.peak_lr:g}, {config.precision}"
            f"{f', weights rounded to {config.qat}' * (config.qat is not None)}",
            *(f"note: {note}" for note in job.notes),
            f"{config.dataset}: {len(sets.train)} training images, {len(sets.held_out)} held out "
            f"({sets.held_out_split}); {mesh} ({devices.flat[0].device_kind}), {config.workers} workers",
            f"run folder {folder}",
        ]
    )
