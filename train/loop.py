"""The story of a run: data, model, optimiser, epochs of steps and evaluations, and the weights at the end."""

import math
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

import convert
from convert.metadata import describe
from train.config import TrainConfig
from train.data import eval_batches, train_batches
from train.job import Job
from train.metrics import MetricsLog
from train.optimizer import make_optimizer
from train.progress import Progress
from train.run_folder import create_run_folder, write_config
from train.schedule import learning_rates
from train.sharding import device_batches
from train.state import abstract_model, abstract_state, init_state
from train.step import abstract_batch, jit_eval_step, jit_train_step, make_eval_step, make_train_step
from train.transforms import eval_transform, one_torch_thread, train_transform

WEIGHTS_FILE = "weights.safetensors"
_STEPS_BEHIND = 2  # metrics are fetched so many steps late, so that the devices never wait for the host


class TrainingFailed(RuntimeError):
    """The run cannot go on; the message is one line."""


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    folder: Path
    final: dict[str, float]  # the last evaluation: eval/loss, eval/top1, and from 6 classes on eval/top5
    best_top1: float  # in percent
    best_epoch: int  # counted from 1
    seconds: float

    def summary(self) -> str:
        """A few lines for the user."""
        minutes, seconds = divmod(round(self.seconds), 60)
        top5 = f", top-5 {self.final['eval/top5']:.2f} %" if "eval/top5" in self.final else ""
        return (
            f"held-out top-1 {self.final['eval/top1']:.2f} %{top5}, loss {self.final['eval/loss']:.4f} "
            f"(best top-1 {self.best_top1:.2f} %, epoch {self.best_epoch}); {minutes} min {seconds:02} s\n"
            f"run folder {self.folder}, weights {self.folder / WEIGHTS_FILE}"
        )


def train(job: Job) -> Result:
    """Run a job to its end. Raises TrainingFailed if the loss is not finite, and what the data raises."""
    start = time.perf_counter()
    config, model_config, mesh = job.config, job.model_config, job.mesh

    # --- the run's folder ---
    folder = create_run_folder(config)
    write_config(folder, config, model=describe(model_config, job.image_sets.class_names), data=_describe_data(job))
    print(_headline(job, folder), flush=True)

    # --- data: Grain decodes and augments in its workers, and brings batches to the devices ahead of time ---
    one_torch_thread()
    train_stream = device_batches(
        train_batches(
            job.image_sets.train,
            train_transform(config, model_config),
            batch_size=config.batch_size,
            seed=config.seed,
            workers=config.workers,
        ),
        mesh,
    )
    eval_stream = device_batches(
        eval_batches(
            job.image_sets.held_out,
            eval_transform(model_config),
            batch_size=job.eval_batch_size,
            workers=config.workers,
        ),
        mesh,
    )

    # --- model, optimiser, and the three programs that the devices run, compiled at the same time ---
    model = abstract_model(model_config)
    optimizer = make_optimizer(config, steps_per_epoch=job.steps_per_epoch, no_weight_decay=model.no_weight_decay())
    shapes = abstract_state(model, optimizer)
    train_shapes = abstract_batch(model_config.image_size, config.batch_size, masked=False)
    eval_shapes = abstract_batch(model_config.image_size, job.eval_batch_size, masked=True)
    with ThreadPoolExecutor() as threads:
        init = threads.submit(init_state, model_config, optimizer, seed=config.seed, mesh=mesh)
        lowered = jit_train_step(make_train_step(model, optimizer, config), mesh).lower(shapes, train_shapes)
        compiling = threads.submit(lowered.compile)
        eval_step = jit_eval_step(make_eval_step(model), mesh).lower(shapes["params"], eval_shapes).compile()
        state, train_step = init.result(), compiling.result()
    rates = learning_rates(config)

    # --- epochs ---
    final: dict[str, float] = {}
    best_top1, best_epoch = -math.inf, 0
    with (
        closing(train_stream),
        closing(eval_stream),
        MetricsLog(folder) as log,
        closing(Progress(epochs=config.epochs, steps_per_epoch=job.steps_per_epoch)) as progress,
    ):
        for epoch in range(1, config.epochs + 1):
            first_step = (epoch - 1) * job.steps_per_epoch
            meter = Meter(log, progress, config=config, epoch=epoch, first_step=first_step, lr=float(rates[epoch - 1]))
            for _ in range(job.steps_per_epoch):
                state, metrics = train_step(state, next(train_stream))
                meter.add(metrics)
            values = meter.finish()
            if epoch % config.eval_every == 0 or epoch == config.epochs:
                final = evaluate(eval_step, state["params"], eval_stream, steps=job.eval_steps)
                log.write(step=meter.step, epoch=epoch, values=final)
                if final["eval/top1"] > best_top1:
                    best_top1, best_epoch = final["eval/top1"], epoch
                values |= final
            progress.epoch(epoch=epoch, step=meter.step, values=values)

    # --- the weights ---
    convert.save(
        jax.device_get(state["params"]),
        model_config,
        folder / WEIGHTS_FILE,
        class_names=job.image_sets.class_names,
    )
    return Result(folder, final, best_top1, best_epoch, time.perf_counter() - start)


def evaluate(eval_step, params: Any, batches: Iterator[dict[str, jax.Array]], *, steps: int) -> dict[str, float]:
    """Loss, and top-1 and (from 6 classes on) top-5 in percent, over the images of the next `steps` batches."""
    sums: Counter[str] = Counter()
    pending: deque[dict[str, jax.Array]] = deque()
    for _ in range(steps):
        pending.append(eval_step(params, next(batches)))
        if len(pending) > _STEPS_BEHIND:
            sums.update(jax.device_get(pending.popleft()))
    for values in pending:
        sums.update(jax.device_get(values))
    images = float(sums["count"])
    percent = {f"eval/{name}": 100 * float(sums[name]) / images for name in ("top1", "top5") if name in sums}
    return {"eval/loss": float(sums["loss"]) / images, **percent}


class Meter:
    """Takes the metrics of one epoch's steps, and tells them to the log, the progress bar and, at the end, the loop."""

    def __init__(
        self, log: MetricsLog, progress: Progress, *, config: TrainConfig, epoch: int, first_step: int, lr: float
    ):
        self._log, self._progress, self._config = log, progress, config
        self._epoch, self._lr = epoch, lr
        self.step = first_step  # training steps that are done and known
        self._pending: deque[dict[str, jax.Array]] = deque()
        self._whole, self._window = Mean(), Mean()  # the epoch, and what is not logged yet

    def add(self, metrics: dict[str, jax.Array]) -> None:
        """The metrics of the next step, perhaps not computed yet. Raises TrainingFailed as `finish` does."""
        self._pending.append(metrics)
        if len(self._pending) > _STEPS_BEHIND:
            self._take(self._pending.popleft())

    def finish(self) -> dict[str, float]:
        """Wait for the last steps; the epoch's means by the names they have in the log.

        Raises TrainingFailed if the loss of a step is NaN or infinite.
        """
        while self._pending:
            self._take(self._pending.popleft())
        if self._window.steps:
            self._write()
        return self._values(self._whole)

    def _take(self, metrics: dict[str, jax.Array]) -> None:
        loss, top1 = (float(jax.device_get(metrics[name])) for name in ("loss", "top1"))
        self.step += 1
        if not math.isfinite(loss):
            raise TrainingFailed(
                f"the loss became {loss} in step {self.step} (epoch {self._epoch}, learning rate {self._lr:g}); "
                "a lower --lr or a longer --warmup-epochs may help"
            )
        self._whole.add(loss, 100 * top1)
        self._window.add(loss, 100 * top1)
        speed = self._window.steps_per_s * self._config.batch_size
        self._progress.step(epoch=self._epoch, loss=loss, top1=100 * top1, lr=self._lr, images_per_s=speed)
        if self.step % self._config.log_every == 0:
            self._write()

    def _write(self) -> None:
        self._log.write(step=self.step, epoch=self._epoch, values=self._values(self._window))
        self._window = Mean()

    def _values(self, mean: "Mean") -> dict[str, float]:
        return {
            "train/loss": mean.loss / mean.steps,
            "train/top1": mean.top1 / mean.steps,
            "train/lr": self._lr,
            "train/images_per_s": mean.steps_per_s * self._config.batch_size,
        }


class Mean:
    """Sums of losses and accuracies since it was made, and how long ago that was."""

    def __init__(self):
        self.loss, self.top1, self.steps = 0.0, 0.0, 0
        self._start = time.perf_counter()

    def add(self, loss: float, top1: float) -> None:
        self.loss, self.top1, self.steps = self.loss + loss, self.top1 + top1, self.steps + 1

    @property
    def steps_per_s(self) -> float:
        return self.steps / (time.perf_counter() - self._start)


def _describe_data(job: Job) -> dict[str, Any]:
    sets = job.image_sets
    return {
        "train_images": len(sets.train),
        "held_out_images": len(sets.held_out),
        "held_out_split": sets.held_out_split,
        "steps_per_epoch": job.steps_per_epoch,
    }


def _headline(job: Job, folder: Path) -> str:
    config, model, sets, devices = job.config, job.model_config, job.image_sets, job.mesh.devices
    return (
        f"CrossViT {model.name} at {model.image_size[0]} pixels, {model.num_classes} classes, "
        f"recipe {config.recipe}, batch {config.batch_size}, peak learning rate {config.peak_lr:g}\n"
        f"{config.dataset}: {len(sets.train)} training images, {len(sets.held_out)} held out ({sets.held_out_split}); "
        f"{devices.size} devices ({devices.flat[0].device_kind}), {config.workers} workers\n"
        f"run folder {folder}"
    )
