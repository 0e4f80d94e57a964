"""The interface between a run and what is learned in it.

The training step, the loop, the log, the progress bar and the checkpoints know a task by this interface only: they know
no labels, no accuracies and no names of layers.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from flax import nnx
from jax import Array
from jax.sharding import Mesh

from train.data.sources import Source

Batch = Mapping[str, Any]  # arrays whose first axis is that of the images, or their shapes
Tree = Any  # nested containers of arrays
LATER = "later"  # among the outputs of `Task.evaluate`: what stays on the devices unless `Scores.add` needs it


class Metric(NamedTuple):
    """A number that tells how good a model is. The loss is none of them: every task has it, under `loss`."""

    name: str  # in the log, behind `train/`, `eval/` or `eval/ema_`
    label: str  # for people
    unit: str = ""  # "%": the devices compute a share, and the log has it in percent
    better: Literal["max", "min"] | None = None  # which values are better, where it may choose the best checkpoint

    def shown(self, value: float, digits: int = 2) -> str:
        """Label and value as the log has it, for the user."""
        return f"{self.label} {value:.{digits}f}{' %' if self.unit == '%' else ''}"


class Scores(Protocol):
    """What an evaluation adds up on the host, over all images of a data set."""

    def add(self, outputs: Tree) -> None:
        """The outputs of `Task.evaluate` for the next batch, as numpy arrays; those under `LATER` are still on the
        devices."""

    def values(self) -> dict[str, float]:
        """`images`, how many there were that could be read; unless that is 0, `loss` and the metrics in their units."""

    def details(self) -> dict[str, float]:
        """What is told of an evaluation alone, beside `values`; there are images that could be read."""

    def check_place(self, folder: Path) -> None:
        """Raises ConversionError if `write` would replace a file there that it did not write."""

    def write(self, folder: Path, *, about: Mapping[str, Any], images: Sequence[str]) -> list[str]:
        """Writes all that is known into a folder, and what was evaluated (JSON values); returns the files' names.

        Args:
            images: the names of those that were evaluated, in their order.

        Raises NotWritten.
        """


class Task(Protocol):
    """What is learned: made once for a run, from its settings, its data and the weights that it starts from.

    Tasks are hashable, and equal where they would trace the same programs. One that trains other parameters than it is
    after also has `published(state)`: what is evaluated and left by a run, in the form of those trained, by the whole
    training state.
    """

    metrics: tuple[Metric, ...]  # the first with `better` chooses the best checkpoint

    def headline(self) -> str:
        """What is learned by which model, in a few words."""

    def model(self, *, dtype: Any, rngs: nnx.Rngs) -> nnx.Module:
        """A new model; beside the call it has `no_weight_decay()`, `layer_of(name)` and `is_head(name)`, and where no
        output depends on some of its parameters, `unused(name)`."""

    def save(self, params: Tree, path: Path, *, origin: str | None = None) -> None:
        """Writes the weights with all that they should know of themselves, see `convert.save`."""

    def transform(self, *, training: bool) -> Callable[..., dict[str, Any]]:
        """What is done to a sample on the host: picklable, see `train.images.transforms`.

        Transforms of evaluation have `blank()`, a sample that stands in for an unreadable image.
        """

    def batch_shapes(self, batch_size: int, *, training: bool) -> Batch:
        """The shapes of a batch as the devices get it: enough to compile a step. In evaluation `image` is uint8."""

    def augment(self, batch_size: int, mesh: Mesh) -> Callable[[Batch, int], Batch]:
        """The function (batch, step) -> batch that augments on the devices what `transform` left to them, compiled."""

    def prepare(self, batch: Batch, key: Array) -> Batch:
        """On the devices, with the whole batch before gradient accumulation cuts it: mixing, targets, normalisers.

        The first axis of everything is that of the images. A normaliser, such as the number of boxes, is the mean over
        the whole batch, repeated for each image: then the mean of the parts' losses is the loss of the batch.
        """

    def extra(self, params: Tree) -> Tree | None:
        """State of the task's own at the start of a run (a teacher, a centre); None adds nothing to a checkpoint.

        New arrays of numbers or truth values, of numpy or jax, no keys of jax.random. Called when the parameters are on
        the devices, in no program, so that large arrays of numpy become constants of none; and before, with shapes for
        parameters, under `jax.eval_shape`.
        """

    def loss(self, model: nnx.Module, batch: Batch, extra: Tree | None, *, rngs: nnx.Rngs) -> tuple[Array, Tree]:
        """The mean loss of a prepared batch, or of a part of it, and a dict: its metrics by name, and more.

        With gradient accumulation, the dict that `update` and the log get is the mean of those of the parts.
        """

    def update(self, extra: Tree, aux: Tree, params: Tree, step: Array) -> Tree:
        """The task's own state after a step of the optimiser."""

    def evaluate(self, model: nnx.Module, batch: Batch) -> Tree:
        """On the devices: what `scores` wants to know of a batch, in arrays of fixed shapes. Its images are normalised
        by then."""

    def draw_batch(self, batch: Batch, path: Path) -> None:
        """A picture of training images with what is to be learned of them; everything is on the host.

        Raises NotWritten.
        """

    def draw_outputs(self, batch: Batch, outputs: Tree, path: Path) -> None:
        """A picture of held-out images and of what `evaluate` made of them, likewise."""

    def scores(self, source: Source) -> Scores:
        """A new `Scores` of the images of a source, to which nothing was added yet."""


def choosing_metric(metrics: tuple[Metric, ...]) -> Metric:
    """The metric that chooses the best checkpoint: the first that may, or the loss."""
    return next((metric for metric in metrics if metric.better), Metric("loss", "loss", better="min"))
