"""Detectors and segmenters: weights of one made of any other's, and changed settings."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert.architecture import BODY, expected_shapes, model_class
from convert.changes.adapt import adapt
from convert.errors import ConversionError, listed
from convert.tree import flatten
from convert.weights import Weights
from crossvit_jax.config import CONFIGS, CrossViTConfig, DenseConfig, build_dense_config

TASKS = ("classification", *CONFIGS)
# what other weights would be needed for; all else changes no tensor, or those of the classes alone
_FIXED = ("width", "strides", "num_convs", "decoder", "scse", "num_blocks")


def adapt_to_task(weights: Weights, task: str | None, overrides: Mapping[str, Any], *, seed: int = 0) -> Weights:
    """The weights for a task, with some settings replaced.

    The same task: see `convert.changes.adapt.adapt`; a detector or segmenter with other `num_classes` gets a new last
    layer. Another task: the body is taken, and what stands on it is new, initialised as in a fresh model. Each change
    of tensors is told in `notes`.

    Args:
        task: "classification", "detection" or "segmentation"; None: that of the weights.
        overrides: settings, see `CrossViTConfig.replace` and `DenseConfig.replace`.
        seed: of what is new.

    Raises:
        ConversionError: no such task; or a setting has a value that makes no model, or would need other weights.
        TypeError: an override is no setting, or `num_classes` is missing for another task.
    """
    if task not in (None, *TASKS):
        raise ConversionError(f"task must be {listed(map(repr, TASKS))}; got {task!r}")
    config = weights.config
    if task in (None, config.task):
        return (
            _adapt_dense(weights, overrides, seed)
            if isinstance(config, DenseConfig)
            else adapt(weights, overrides, seed=seed)
        )
    body = body_of(weights)
    if task == "classification":
        if "num_classes" not in overrides:
            raise TypeError("num_classes is missing: how many classes the new head is to tell apart")
        return adapt(body, overrides, seed=seed)
    try:
        new = build_dense_config(task, body.config, **overrides)
    except ValueError as error:
        raise ConversionError(str(error)) from None
    body = adapt(body, _settings_of(new.backbone), seed=seed)
    fresh = _fresh(new, seed, body.tensors["cls_token_0"].dtype)
    notes = (*body.notes, f"new for {task}, and untrained: {_parts(fresh)}")
    return dataclasses.replace(body, config=new, tensors=_with_body(body) | fresh, class_names=None, notes=notes)


def body_of(weights: Weights) -> Weights:
    """The weights of the CrossViT without a head; what is dropped is told."""
    config, tensors, notes = weights.config, weights.tensors, weights.notes
    if isinstance(config, DenseConfig):
        rest = _parts(name for name in tensors if not name.startswith(BODY))
        notes = (*notes, f"dropped of the {config.task} weights: {rest}")
        tensors = {name.removeprefix(BODY): array for name, array in tensors.items() if name.startswith(BODY)}
        return dataclasses.replace(weights, config=config.backbone, tensors=tensors, class_names=None, notes=notes)
    if config.reduce_tokens is not None:  # of no use where every patch is needed
        notes = (*notes, f"reduce_tokens {config.reduce_tokens} dropped: all tokens are computed")
    return adapt(dataclasses.replace(weights, notes=notes), {"num_classes": 0, "reduce_tokens": None})


def _adapt_dense(weights: Weights, overrides: Mapping[str, Any], seed: int) -> Weights:
    """See `adapt_to_task`: the task stays."""
    old = weights.config
    patches = old.backbone.patch_size
    if overrides.get("patch_size", patches) != patches:
        raise ConversionError(f"patch_size must stay {patches}: a {old.task} model's pyramid is made for its grids")
    try:
        config = old.replace(**overrides)
    except ValueError as error:
        raise ConversionError(str(error)) from None
    fixed = [f"{key} is {getattr(old, key)}" for key in _FIXED if getattr(config, key, None) != getattr(old, key, None)]
    if fixed:
        raise ConversionError(f"in these weights {' and '.join(fixed)}; that cannot be changed")
    body = Weights(
        config=old.backbone,
        tensors={name.removeprefix(BODY): array for name, array in weights.tensors.items() if name.startswith(BODY)},
        notes=weights.notes,
    )
    body = adapt(body, _settings_of(config.backbone))
    tensors = {**weights.tensors, **_with_body(body)}
    notes, class_names = body.notes, weights.class_names
    if config.num_classes != old.num_classes:
        fresh = _fresh(config, seed, body.tensors["cls_token_0"].dtype)
        other = {name: fresh[name] for name in sorted(class_axes(config))}
        tensors |= other
        told = f"{config.num_classes} classes instead of {old.num_classes}"
        notes, class_names = (*notes, f"new for {told}, and untrained: {listed(other)}"), None
    return dataclasses.replace(weights, config=config, tensors=tensors, class_names=class_names, notes=notes)


def with_fresh_classes(weights: Weights, *, seed: int) -> Weights:
    """The weights of a detector or segmenter with a new last layer, for as many classes of other names."""
    fresh = _fresh(weights.config, seed, weights.tensors[f"{BODY}cls_token_0"].dtype)
    tensors = {**weights.tensors, **{name: fresh[name] for name in class_axes(weights.config)}}
    return dataclasses.replace(weights, tensors=tensors, class_names=None)


def class_axes(config: DenseConfig) -> dict[str, int]:
    """The tensors whose shapes follow from the number of classes, by their names, and along which axis."""
    shapes, others = (expected_shapes(c) for c in (config, config.replace(num_classes=config.num_classes + 1)))
    return {
        name: next(axis for axis, (side, other) in enumerate(zip(shape, others[name], strict=True)) if side != other)
        for name, shape in shapes.items()
        if shape != others[name]
    }


def _settings_of(config: CrossViTConfig) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def _with_body(body: Weights) -> dict[str, np.ndarray]:
    """The tensors of a CrossViT under the names that they have in a detector or segmenter."""
    return {f"{BODY}{name}": array for name, array in body.tensors.items()}


def _parts(names: Any) -> str:
    """The parts of a model that tensors belong to, such as `backbone.pyramid` and `head`."""
    return listed(dict.fromkeys("backbone.pyramid" if n.startswith("backbone.") else n.split(".")[0] for n in names))


def _fresh(config: DenseConfig, seed: int, dtype: np.dtype) -> dict[str, np.ndarray]:
    """The tensors beside the body of a freshly initialised model, under torch's names."""
    return {name: array.astype(dtype) for name, array in flatten(_draw(config, seed)).items()}


@functools.partial(jax.jit, static_argnums=(0, 1))  # which leaves out whatever is not returned: the body is not drawn
def _draw(config: DenseConfig, seed: int) -> dict[str, Any]:
    model = model_class(config)(config, param_dtype=jnp.float32, rngs=nnx.Rngs(seed))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    params["backbone"] = {name: part for name, part in params["backbone"].items() if name != "body"}
    return params
