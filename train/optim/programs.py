"""The programs that the devices run for a task, compiled at the same time in threads."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from train.config import TrainConfig
from train.devices.memory import StepMemory, step_memory
from train.devices.mesh import state_shardings
from train.optim.optimizer import make_optimizer
from train.optim.state import State, abstract_model, abstract_state, lower_init
from train.optim.step import jit_eval_step, jit_train_step, make_eval_step, make_train_step
from train.tasks.begin import variants_of
from train.tasks.task import Batch, Task, Tree


@dataclass(frozen=True)
class Plan:
    """What decides the programs."""

    task: Task
    config: TrainConfig  # nothing left open that depends on the machine
    mesh: Mesh
    steps_per_epoch: int  # for the learning rate
    eval_batch_size: int | None = None  # none: nothing is evaluated
    compiler_options: Mapping[str, Any] | None = None  # of XLA, for the training step


def compiler_options(config: TrainConfig, platform: str) -> dict[str, bool | int] | None:
    """What XLA is told, beside the program, for the steps of a run on a platform ("gpu", …); none: nothing."""
    if not config.deterministic or platform != "gpu":
        return None
    return {
        "xla_gpu_exclude_nondeterministic_ops": True,  # cuDNN's gradient of attention, and sums by atomic additions
        # what is tried out at every start, and chosen by its time, may differ in its rounding from start to start
        "xla_gpu_autotune_level": 0,
        "xla_gpu_enable_triton_gemm": False,  # whose products are slow, or impossible, where nothing is tried out
    }


class Programs:
    """Compiles from the moment that it is made; each property waits for its own program only. Close it after use.

    What jax and XLA raise in compiling, such as too little memory for a program, comes from the properties.

    Attributes:
        plan: what it was made from.
        state: the shapes of the training state, and how its arrays lie on the devices.
        traced: the training step before it is lowered; of several, the one that takes most work.
    """

    def __init__(self, plan: Plan, *, new_state: bool = False, params: Tree | None = None):
        """
        Args:
            new_state: a new state will be wanted, so its program is compiled too, before the others.
            params: that it starts from, as numpy arrays; none: newly drawn ones.
        """
        self.plan = plan
        task, config, mesh = plan.task, plan.config, plan.mesh
        self._model = abstract_model(task, config)
        self._optimizer = make_optimizer(
            config,
            steps_per_epoch=plan.steps_per_epoch,
            no_weight_decay=self._model.no_weight_decay(),
            layer_of=self._model.layer_of,
        )
        shapes = abstract_state(self._model, self._optimizer, config, task)
        self._shardings = state_shardings(shapes, mesh)
        self.state: State = jax.tree.map(
            lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, self._shardings
        )
        self._threads = ThreadPoolExecutor()
        start = self._threads.submit
        self._new_state = start(self._lower_init(params)) if new_state else None
        options = compiler_options(config, mesh.devices.flat[0].platform)
        batch, self._train_steps = self._batch(config.batch_size, training=True), []
        self._eval_step = self._augment = None
        with jax.set_mesh(mesh):  # see `crossvit_jax.kernels.attention.dot_product_attention`
            for variant in variants_of(task):
                train_step = make_train_step(self._model, variant, self._optimizer, config)
                traced = jit_train_step(train_step, mesh, shapes, options).trace(shapes, batch)
                if not self._train_steps:
                    self.traced: jax.stages.Traced = traced
                self._train_steps.append(start(traced.lower().compile, plan.compiler_options))
            if plan.eval_batch_size is not None:
                eval_step = jit_eval_step(make_eval_step(self._model, task), mesh, shapes["params"], options)
                eval_batch = self._batch(plan.eval_batch_size, training=False)
                self._eval_step = start(eval_step.lower(shapes["params"], eval_batch).compile)
        if config.augment_on == "device":  # last: while qwix traces a model, it has its hands on jax itself
            self._augment = start(lambda: task.augment(config.batch_size, mesh))

    def new_state(self, params: Tree | None = None) -> State:
        """A new training state on the devices. The same seed gives the same bits.

        Args:
            params: that it starts from, as numpy arrays; none: newly drawn ones. Left out where `Programs` was told.
        """
        started, self._new_state = self._new_state, None  # it is used once, and is not to be kept in memory
        return self._lower_init(params)() if started is None else started.result()

    @property
    def train_step(self) -> jax.stages.Compiled:
        """The step (state, batch) -> (state, metrics), see `make_train_step`; the old state is gone afterwards.

        Of several, the one that takes most work.
        """
        return self._train_steps[0].result()

    def step_after(self, steps: int) -> jax.stages.Compiled:
        """The training step to take after so many: where there are several, drawn from them by seed and step alone."""
        count = len(self._train_steps)
        drawn = np.random.default_rng((self.plan.config.seed, steps)).integers(count) if count > 1 else 0
        return self._train_steps[drawn].result()

    @property
    def memory(self) -> StepMemory:
        """What the training step takes on each device; of several, the one that takes most work."""
        config, mesh = self.plan.config, self.plan.mesh
        images = self._batch(config.batch_size, training=True)["image"]
        augmented = images.size // mesh.size if config.augment_on == "device" else 0
        return step_memory(self.train_step, augmented=augmented)

    @property
    def eval_step(self) -> jax.stages.Compiled:
        """(params, batch) -> outputs, see `Task.evaluate`; for the weights and for their moving average."""
        return self._eval_step.result()

    @property
    def augment(self) -> Callable[[Batch, int], Batch] | None:
        """(batch, step) -> the batch augmented, see `Task.augment`; None where the host does that."""
        return self._augment and self._augment.result()

    def close(self) -> None:
        """Waits for what is being compiled, begins with nothing else, and ends the threads."""
        self._threads.shutdown(cancel_futures=True)

    def _lower_init(self, params: Tree | None) -> Callable[[], State]:
        plan = self.plan
        return lower_init(plan.task, self._model, self._optimizer, plan.config, plan.mesh, self._shardings, params)

    def _batch(self, batch_size: int, *, training: bool) -> dict[str, jax.ShapeDtypeStruct]:
        shapes = self.plan.task.batch_shapes(batch_size, training=training)
        return {**shapes, "bad": jax.ShapeDtypeStruct((batch_size,), jnp.int32)}
