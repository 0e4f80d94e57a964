"""Weights from any source, and a forward pass with them on all devices of this machine."""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from convert import load_weights
from convert.errors import SettingsError
from convert.models import flax_model
from convert.weights import Weights
from crossvit_jax import CrossViTConfig
from crossvit_jax.config import DenseConfig
from crossvit_jax.preprocess import Exif
from train.devices.attention import choose_attention
from train.devices.memory import available_memory, check_image_size
from train.devices.mesh import batch_sharding, default_precision, make_mesh, precision_note, replicated
from train.devices.normalise import normalise_batch
from train.optim.quantize import quantised, require_qwix
from train.tasks.begin import TASKS, settings_of, task_of
from train.tasks.classification import Classification
from train.tasks.task import LATER, Batch, Task

# images at a time on one device, where the user names no number
_BATCH_PER_CPU = 32
_BATCH_PER_ACCELERATOR = 256
BATCHES_BEHIND = 2  # results are fetched so many batches late, so that the devices never wait for the host


def forward(program: Callable[[Batch], Any], batches: Iterator[Batch]) -> Iterator[Any]:
    """What a program makes of each batch, as numpy arrays, in their order; what it has under `LATER` stays on the
    devices. Batches are not kept there.

    Args:
        program: a compiled function of a batch.
    """
    pending: deque[Any] = deque()
    for outputs in map(program, batches):
        pending.append(outputs)
        if len(pending) > BATCHES_BEHIND:
            yield _fetched(pending.popleft())
    while pending:
        yield _fetched(pending.popleft())


def _fetched(outputs: Any) -> Any:
    if not isinstance(outputs, dict) or LATER not in outputs:
        return jax.device_get(outputs)
    return jax.device_get(at_once(outputs)) | {LATER: outputs[LATER]}


def at_once(outputs: dict[str, Any]) -> dict[str, Any]:
    """The outputs but those under `LATER`."""
    return {name: value for name, value in outputs.items() if name != LATER}


@dataclass(frozen=True)
class Predictor:
    """A model in evaluation mode, its parameters on every device."""

    task: Task
    class_names: tuple[str, ...] | None  # in the order of the logits, where the weights know them
    notes: tuple[str, ...]  # what the user should know about the weights
    trained_exif: Exif | None  # what training did with EXIF orientations, where the weights tell
    precision: str  # of the arithmetic: float32, bfloat16 or float16
    graphdef: nnx.GraphDef
    params: Any
    mesh: Mesh
    patch_sizes: tuple[tuple[int, ...], ...] | None = None  # that training drew from, where the weights tell
    entropies: tuple[float, ...] | None = None  # that part the training pictures evenly among these, likewise

    @property
    def platform(self) -> str:
        """What jax calls the devices: cpu, gpu, tpu."""
        return self.mesh.devices.flat[0].platform

    def batch_size(self, wanted: int | None, images: int | None) -> int:
        """The images to run at a time: a multiple of the number of devices, and no larger than there are images, where
        that is known."""
        devices = self.mesh.size
        per_device = _BATCH_PER_CPU if self.platform == "cpu" else _BATCH_PER_ACCELERATOR
        size = wanted or per_device * devices
        size = size if images is None else min(size, images)
        return -(-size // devices) * devices

    @property
    def device_summary(self) -> str:
        """The devices in words."""
        count = self.mesh.size
        return f"{count} {'device' if count == 1 else 'devices'} ({self.mesh.devices.flat[0].device_kind})"

    def compile(
        self, function: Callable[[nnx.Module, Batch], Any], batch: Mapping[str, jax.ShapeDtypeStruct]
    ) -> Callable[[Batch], Any]:
        """Compile a function of the model and a batch of these shapes for all devices; it gets images normalised.

        Returns:
            The function of a batch. The first axis of everything in a batch is that of its images, and is cut over the
            devices.
        """

        def run(params: Any, batch: Batch) -> Any:
            # unless they are told, accelerators multiply float32 with fewer bits
            with jax.default_matmul_precision("float32" if self.precision == "float32" else None):
                return function(nnx.merge(self.graphdef, params), normalise_batch(batch))

        whole, cut = replicated(self.mesh), batch_sharding(self.mesh)
        # the parameters are an argument: closed over, they would become constants of the program
        jitted = jax.jit(run, in_shardings=(whole, cut))
        # what is compiled ahead compares layouts when it is called, and jax tells a wrong one for 4 bits
        compares_wrongly = any(leaf.dtype == jnp.int4 for leaf in jax.tree.leaves(self.params))
        if compares_wrongly or jax.config.jax_disable_jit:  # with that, nothing that is compiled ahead is called
            return lambda batch: self._under_mesh(jitted, batch)
        with jax.set_mesh(self.mesh):  # see `crossvit_jax.kernels.attention.dot_product_attention`
            compiled = jitted.lower(self.params, batch).compile()
        return lambda batch: compiled(self.params, batch)

    def _under_mesh(self, jitted: Callable[[Any, Batch], Any], batch: Batch) -> Any:
        with jax.set_mesh(self.mesh):
            return jitted(self.params, batch)

    def run(
        self, function: Callable[[nnx.Module, Batch], Any], batch: Mapping[str, jax.ShapeDtypeStruct]
    ) -> Callable[[Iterator[Batch]], Iterator[Any]]:
        """Compile a function as `compile` does.

        Returns:
            What runs it on batches: its outputs as numpy arrays, in their order, see `forward`.
        """
        program = self.compile(function, batch)
        return lambda batches: forward(program, batches)


class Classifier(Predictor):
    """A CrossViT with a head."""

    task: Classification

    @property
    def config(self) -> CrossViTConfig:
        return self.task.model_config


def load_predictor(
    source: str,
    *,
    image_size: tuple[int, int] | None = None,
    patch_size: tuple[int, ...] | None = None,
    crop_pct: float | None = None,
    precision: str | None = None,
    fp32_residual: bool = False,
    attention_kernel: str = "auto",
    reduce_tokens: str | None = None,
    quantize: str | None = None,
    exif: Exif | None = None,
    **settings: Any,
) -> Predictor:
    """The model in any source that `convert.load_weights` reads: a `Classifier`, a detector or a segmenter.

    Args:
        image_size: (height, width) to resample the position embeddings to; none: as stored.
        patch_size: pixels of each branch's patches, to which kernels and positions are resized; none: as stored.
        crop_pct: share of the resized image that a classifier's evaluation crop keeps; none: as stored.
        precision: float32, bfloat16 or float16; none: see `train.devices.mesh.default_precision`.
        fp32_residual: see `CrossViT.set_fp32_residual`.
        attention_kernel: auto, xla, cudnn or tpu, see `train.devices.attention.choose_attention`.
        reduce_tokens: how a classifier computes with fewer tokens, see `crossvit_jax.config.Reduction`, or "none" for
            all of them; none: as stored.
        quantize: int8 or int4 to round a classifier's linear layers' weights to, see `train.optim.quantize`; none: as
            stored.
        exif: what to do with EXIF orientations, see `crossvit_jax.preprocess.decode_image`; none: what training did,
            or keep where that is not known.
        settings: fields of the task, such as `score_threshold` of a detector.

    Raises:
        ConversionError, SettingsError: see `checked_weights`; or jax finds no device; or qwix is needed and not
            installed; or cuDNN's attention is asked for and cannot be had; or a setting is none of the model's task.
    """
    if quantize is not None:
        require_qwix("--quantize")
    mesh = make_mesh()
    available = available_memory(mesh)
    if image_size is not None:
        check_image_size(image_size, (), mesh, available=available)
    changes = {"image_size": image_size, "patch_size": patch_size, "crop_pct": crop_pct, "reduce_tokens": reduce_tokens}
    weights = checked_weights(source, **{field: value for field, value in changes.items() if value is not None})
    learned = task_of(weights.config)
    of_classifiers = {"crop_pct": crop_pct, "quantize": quantize}
    given = {name: value for name, value in of_classifiers.items() if value is not None}
    _check_settings(source, learned, given | settings)
    body = weights.config.backbone if isinstance(weights.config, DenseConfig) else weights.config
    check_image_size(body.image_size, body.branches, mesh, available=available)
    precision = precision or default_precision(mesh)
    kernel, notes = choose_attention(attention_kernel, weights.config, precision, mesh, training=False)
    model = flax_model(weights, dtype=precision)
    model.set_attention(kernel)
    model.set_fp32_residual(fp32_residual)
    graphdef, state = nnx.split(model)
    params = jax.device_put(nnx.to_pure_dict(state), replicated(mesh))
    if quantize is not None:
        graphdef, state = nnx.split(quantised(nnx.merge(graphdef, params), quantize))
        params = nnx.to_pure_dict(state)
    names = weights.class_names or tuple(map(str, range(weights.config.num_classes)))
    config = dataclasses.replace(settings_of(learned), exif=exif or weights.exif or "keep")
    task = TASKS[learned](config, weights.config, names, **settings)
    notes = (*weights.notes, *notes, *precision_note(precision, mesh))
    kind = Classifier if learned == "classification" else Predictor
    known = (weights.class_names, notes, weights.exif, precision, graphdef, params, mesh)
    return kind(task, *known, patch_sizes=weights.patch_sizes, entropies=weights.entropies)


def _check_settings(source: str, learned: str, given: dict[str, Any]) -> None:
    """Raises SettingsError for a setting that a model of this task does not have."""
    known = {field.name for field in dataclasses.fields(TASKS[learned])}
    known |= {"crop_pct", "quantize"} if learned == "classification" else set()
    unknown = [name for name in given if name not in known]
    if unknown:
        raise SettingsError(f"{source} is for {learned}, which has no setting {unknown[0].replace('_', '-')}")


def load_classifier(source: str, **settings: Any) -> Classifier:
    """The classifier in a source. Arguments and errors are those of `load_predictor`; raises SettingsError for other
    models."""
    predictor = load_predictor(source, **settings)
    require_classifier(source, predictor.task.model_config)
    return predictor


def load_classifier_weights(source: str) -> Weights:
    """The weights of a classifier in a source. Raises as `checked_weights`, and SettingsError for other models."""
    weights = checked_weights(source)
    require_classifier(source, weights.config)
    return weights


def require_classifier(source: str, config: Any) -> None:
    """Raises SettingsError for the settings of any other model."""
    if task_of(config) != "classification":
        raise SettingsError(f"{source} is for {task_of(config)}, and a classifier is needed")


def checked_weights(source: str, **overrides: Any) -> Weights:
    """The weights in a source, if they are of a whole model for colour images.

    Args:
        source, overrides: see `convert.load_weights`.

    Raises:
        ConversionError: the source cannot be read or adapted.
        SettingsError: the weights predict nothing from colour images, or hold NaN or infinity.
    """
    weights = load_weights(source, **overrides)
    if weights.config.num_classes == 0:
        raise SettingsError(f"{source} has no head: it gives features, not classes")
    if weights.config.in_chans != 3:
        raise SettingsError(f"{source} is for images with {weights.config.in_chans} channels, not for colour images")
    non_finite = weights.non_finite()
    if non_finite:
        raise SettingsError(f"{source}: {non_finite}")
    return weights
