"""The story of a run: data, model, optimiser, epochs of steps and evaluations, checkpoints, the weights at the end."""

import gc
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

import convert
from convert.errors import SettingsError
from convert.metadata import describe
from convert.tree import nest
from train.data.bad_images import BadImages, too_many
from train.devices.hosts import is_main
from train.devices.memory import available_memory, check_fits, memory_errors_explained, step_memory
from train.devices.mesh import fetch, state_shardings
from train.images.augment import compile_augment
from train.images.transforms import eval_transform, train_transform
from train.job import Job
from train.optim.optimizer import make_optimizer
from train.optim.schedule import learning_rate
from train.optim.state import abstract_model, lower_init
from train.optim.step import abstract_batch, jit_eval_step, jit_train_step, make_eval_step, make_train_step
from train.pictures.curves import draw_curves
from train.run.folder import claim_run_folder, newest_checkpoint, read_run, write_config
from train.run.interruption import Interrupted, Interruption
from train.run.meter import STEPS_BEHIND, Meter, TrainingFailed
from train.run.metrics_log import MetricsLog, NoLog, read_metrics
from train.run.progress import Progress

WEIGHTS_FILE, EMA_FILE, CURVES_FILE = "weights.safetensors", "weights-ema.safetensors", "curves.png"
_CURVES_EVERY_S = 60.0


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    folder: Path
    final: dict[str, float]  # the last evaluation: eval/loss, eval/top1, and from 6 classes on eval/top5
    best: dict[str, float]  # top1 in percent, epoch (from 1) and step of the best evaluation
    seconds: float

    def summary(self) -> str:
        """A few lines for the user."""
        minutes, seconds = divmod(round(self.seconds), 60)
        top5 = f", top-5 {self.final['eval/top5']:.2f} %" if "eval/top5" in self.final else ""
        return (
            f"held-out top-1 {self.final['eval/top1']:.2f} %{top5}, loss {self.final['eval/loss']:.4f} "
            f"(best top-1 {self.best['top1']:.2f} %, epoch {self.best['epoch']}); {minutes} min {seconds:02} s\n"
            f"run folder {self.folder}, weights {self.folder / WEIGHTS_FILE}"
        )


def train(job: Job) -> Result:
    """Run a job to its end, from where an earlier run of it stopped.

    Raises TrainingFailed if the loss is not finite, Interrupted after SIGTERM or Ctrl-C, CheckpointError,
    SettingsError if the program does not fit into memory or the folder is taken, and what the data raises.
    """
    start = time.perf_counter()
    config, model_config, mesh = job.config, job.model_config, job.mesh
    class_names = job.image_sets.class_names

    with ExitStack() as stack:
        interruption = stack.enter_context(Interruption())
        stack.enter_context(memory_errors_explained(config, mesh))

        # --- the run's folder: taken now, written to when nothing can go wrong any more ---
        folder = _claim_folder(job, stack)
        newest_step = newest_checkpoint(folder)
        description = describe(model_config, class_names)
        train_steps = config.epochs * job.steps_per_epoch

        # --- model, optimiser, and the programs that the devices run, compiled at the same time ---
        model = abstract_model(model_config, config)
        optimizer = make_optimizer(config, steps_per_epoch=job.steps_per_epoch, no_weight_decay=model.no_weight_decay())
        initial = None if job.weights is None else nest(job.weights.tensors)
        shapes, init = lower_init(model_config, optimizer, config, mesh, initial)
        train_shapes = abstract_batch(model_config.image_size, config.batch_size, masked=False)
        eval_shapes = abstract_batch(model_config.image_size, job.eval_batch_size, masked=True)
        with ThreadPoolExecutor() as threads:
            initialising = threads.submit(init)
            train_step = jit_train_step(make_train_step(model, optimizer, config), mesh, shapes)
            compiling = threads.submit(train_step.lower(shapes, train_shapes).compile)

            # --- meanwhile: the data, and evaluation; Grain and Orbax take long to import ---
            from train.data.streams import open_eval_stream, open_train_stream
            from train.run.checkpoints import Checkpoints

            def train_stream_from(step: int):
                transform = train_transform(config, model_config)
                stream = open_train_stream(config, job.image_sets.train, transform, mesh, start_step=step)
                return stack.enter_context(closing(stream))

            train_stream = train_stream_from(newest_step)

            @cache
            def eval_stream():
                images, transform = job.image_sets.held_out, eval_transform(model_config)
                stream = open_eval_stream(config, images, transform, mesh, batch_size=job.eval_batch_size)
                return stack.enter_context(closing(stream))

            eval_step = jit_eval_step(make_eval_step(model), mesh, shapes["params"])
            eval_step = eval_step.lower(shapes["params"], eval_shapes)
            augmenting = None
            if config.augment_on == "device":  # not before: while qwix traces the model, it has its hands on jax itself
                augmenting = threads.submit(compile_augment, train_shapes["image"].shape, config, mesh)
            eval_step = eval_step.compile()
            state, train_step = initialising.result(), compiling.result()
            augment = augmenting and augmenting.result()
        memory, available = step_memory(train_step), available_memory(mesh)
        check_fits(memory, available, config, mesh)

        # --- the state that an earlier run left ---
        checkpoints = stack.enter_context(closing(Checkpoints(folder, description=description, say=_say)))
        if is_main() and not job.resumed:
            write_config(folder, job.described)
        progress = {"step": 0, "log_bytes": 0, "meter": None, "best": {"top1": -1.0, "epoch": 0, "step": None}}
        wanted = jax.tree.map(_with_sharding, shapes, state_shardings(shapes, mesh))
        restored = checkpoints.restore(wanted)
        if restored is not None:
            state, progress = restored
        step, best = progress["step"], progress["best"]
        if step != newest_step:  # the newest checkpoint was damaged
            train_stream.close()
            train_stream = train_stream_from(step)
        checkpoints.best_step = best["step"]
        _say(_headline(job, folder))
        _say(memory.describe(available))
        if job.resumed:
            _say(f"continued after step {step} of {train_steps}")

        # --- epochs ---
        bad_train, bad_held_out = BadImages(job.image_sets.train, _say), BadImages(job.image_sets.held_out, _say)
        log = stack.enter_context(_open_log(job, folder, progress))
        shown = Progress(epochs=config.epochs, steps_per_epoch=job.steps_per_epoch, done=step, silent=not is_main())
        stack.enter_context(closing(shown))
        first_step = True
        final: dict[str, float] = {}
        drawn = time.perf_counter()

        def save(meter: Meter) -> None:
            meter_state = meter.catch_up()
            progress = {"step": step, "log_bytes": log.position, "meter": meter_state, "best": best}
            checkpoints.save(step, state, {**progress, "run": job.described})

        def stop_if_wanted() -> None:
            if interruption.wanted(step):
                checkpoints.wait()
                raise Interrupted(
                    f"saved after step {step} in {folder}; --resume {folder} goes on", interruption.status
                )

        interruption.can_save = True
        for epoch in range(max(1, -(-step // job.steps_per_epoch)), config.epochs + 1):
            meter = Meter(
                log,
                shown,
                epoch=epoch,
                step=step,
                batch_size=config.batch_size,
                log_every=config.log_every,
                learning_rate=lambda step: learning_rate(config, step, steps_per_epoch=job.steps_per_epoch),
                check_bad=lambda count: _check_bad(job, bad_train, count),
                state=progress["meter"],
            )
            progress["meter"] = None
            while step < epoch * job.steps_per_epoch:
                batch = next(train_stream)
                bad_train.add(batch.pop("bad_indices"))
                if augment is not None:
                    batch["image"] = augment(batch["image"], step)
                state, metrics = train_step(state, batch)
                step += 1
                if first_step:
                    jax.block_until_ready(metrics)
                    _say(f"the first step was done after {time.perf_counter() - start:.1f} s")
                    first_step = False
                    gc.enable()  # see train.main
                    eval_stream()  # not before: its workers would take the cores from what the first step waits for
                meter.add(metrics)
                if step % config.checkpoint_every == 0 or step % job.steps_per_epoch == 0 or interruption.wanted(step):
                    save(meter)
                    stop_if_wanted()
            values, images_per_s = meter.finish()
            if epoch % config.eval_every == 0 or epoch == config.epochs:
                final = {}
                for name, weights in (("", "params"), ("ema_", "ema")):
                    if weights in state:
                        batches = _watched(eval_stream(), bad_held_out, stop_if_wanted)
                        final |= evaluate(
                            eval_step, state[weights], batches, steps=job.eval_steps, prefix=f"eval/{name}"
                        )
                final["eval/bad_images"] = len(job.image_sets.held_out) - int(final.pop("eval/images"))
                _check_bad(job, bad_held_out, final["eval/bad_images"], held_out=True)
                log.write(step=step, epoch=epoch, values=final)
                top1 = final.get("eval/ema_top1", final["eval/top1"])
                if top1 > best["top1"]:
                    best = {"top1": top1, "epoch": epoch, "step": step}
                    checkpoints.best_step = step
                values |= final
            shown.epoch(epoch=epoch, step=step, values=values, images_per_s=images_per_s)
            if is_main() and (time.perf_counter() - drawn > _CURVES_EVERY_S or epoch == config.epochs):
                draw_curves(read_metrics(folder), folder / CURVES_FILE)
                drawn = time.perf_counter()

        # --- the weights ---
        checkpoints.wait()
        for name, file in (("params", WEIGHTS_FILE), ("ema", EMA_FILE)):
            if name in state:
                params = fetch(state[name], mesh)
                if is_main():
                    convert.save(params, model_config, folder / file, class_names=class_names, overwrite=True)
    return Result(folder, final, best, time.perf_counter() - start)


def evaluate(
    eval_step, params: Any, batches: Iterator[dict[str, jax.Array]], *, steps: int, prefix: str = "eval/"
) -> dict[str, float]:
    """Loss, and top-1 and (from 6 classes on) top-5 in percent, over the images of the next `steps` batches.

    Under `eval/images` also how many images that were. Raises TrainingFailed if there were none.
    """
    sums: Counter[str] = Counter()
    pending: deque[dict[str, jax.Array]] = deque()
    for _ in range(steps):
        pending.append(eval_step(params, next(batches)))
        if len(pending) > STEPS_BEHIND:
            sums.update(jax.device_get(pending.popleft()))
    for values in pending:
        sums.update(jax.device_get(values))
    images = float(sums["count"])
    if not images:
        raise TrainingFailed("none of the held-out images can be read")
    percent = {f"{prefix}{name}": 100 * float(sums[name]) / images for name in ("top1", "top5") if name in sums}
    return {f"{prefix}loss": float(sums["loss"]) / images, **percent, "eval/images": images}


def _watched(batches: Iterator, bad_images: BadImages, stop_if_wanted) -> Iterator[dict[str, jax.Array]]:
    """The batches of an evaluation, which can be broken off."""
    for batch in batches:
        stop_if_wanted()
        bad_images.add(batch.pop("bad_indices"))
        yield batch


def _check_bad(job: Job, bad_images: BadImages, count: int, *, held_out: bool = False) -> None:
    images = len(job.image_sets.held_out if held_out else job.image_sets.train)
    if count > job.config.max_bad_images * images:
        raise too_many(bad_images, count, images, job.config.max_bad_images)


def _claim_folder(job: Job, stack: ExitStack) -> Path:
    """The run's folder, taken by the main process; the others go on when it is there."""
    folder = Path(job.config.output) if job.config.output else None
    if is_main():
        claim = stack.enter_context(closing(claim_run_folder(job.config)))
        folder = claim.folder
        if not job.resumed and read_run(str(folder)) is not None:
            raise SettingsError(f"another run was begun in {folder} meanwhile: name another --output")
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("run folder")
    return folder


def _open_log(job: Job, folder: Path, progress: dict[str, Any]) -> MetricsLog | NoLog:
    if not is_main():
        return NoLog()
    run = None
    if job.config.wandb is not None:
        import wandb

        settings = {"config": job.described, "dir": str(folder), "name": folder.name}
        run = wandb.init(project=job.config.wandb, id=job.described["id"], resume="allow", **settings)
    return MetricsLog(folder, position=progress["log_bytes"], step=progress["step"], wandb_run=run)


def _with_sharding(shape: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def _say(line: str) -> None:
    if is_main():
        print(line, flush=True)


def _headline(job: Job, folder: Path) -> str:
    config, model, sets, devices = job.config, job.model_config, job.image_sets, job.mesh.devices
    notes = () if job.weights is None else job.weights.notes
    start = f" from {config.init}" if config.init else ""
    mesh = ", ".join(f"{axis} {size}" for axis, size in job.mesh.shape.items() if size > 1) or "1 device"
    return "\n".join(
        [
            f"CrossViT {model.name} at {model.image_size[0]} pixels, {model.num_classes} classes{start}, "
            f"recipe {config.recipe}, batch {config.batch_size}, peak learning rate {config.peak_lr:g}, "
            f"{config.precision}{f', weights rounded to {config.qat}' * (config.qat is not None)}",
            *(f"note: {note}" for note in notes),
            f"{config.dataset}: {len(sets.train)} training images, {len(sets.held_out)} held out "
            f"({sets.held_out_split}); {mesh} ({devices.flat[0].device_kind}), {config.workers} workers",
            f"run folder {folder}",
        ]
    )
