"""Cuts hidden neurons of the MLPs and heads of self-attention out of a classifier: those that its loss needs least."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from convert.architecture import abstract_model
from convert.errors import ConversionError
from convert.tree import nest
from convert.weights import Weights
from crossvit_jax.config import CUSTOM, Branch, CrossViTConfig, for_each_branch, mlp_ratio

# what can be cut out of a block, as people know it, and the layer whose inputs it makes
_KINDS = {"mlp": ("hidden neurons", "mlp.fc2.weight"), "heads": ("heads of self-attention", "attn.proj.weight")}

Shares = Mapping[str, Sequence[float]]  # by `mlp` and `heads`, of what is kept: for the widest branch, or for each
Worth = dict[tuple[str, str], Float[np.ndarray, " units"]]  # by block and `mlp` or `heads`


def pruned_config(weights: Weights, shares: Shares) -> CrossViTConfig:
    """The settings of the model that `prune` makes. Where heads are cut out, it is no variant any more.

    Raises:
        ConversionError: it is no classifier, some of its weights are not finite, or nothing would be left of the
            neurons or heads of a block.
    """
    config = weights.config
    if config.task != "classification":
        raise ConversionError(f"only classifiers are pruned, and this is a model for {config.task}")
    if config.num_classes == 0:
        raise ConversionError("a model without a head has no loss by which it could be pruned")
    if broken := weights.non_finite():
        raise ConversionError(broken)
    branches = list(config.branches)
    for kind, given in shares.items():
        for place, share in enumerate(_of_each_branch(kind, given, config)):
            branches[place] = _with_share(kind, share, branches[place], place)
    are_timms = all(branch.is_timms for branch in branches)
    return config.replace(branches=branches, name=config.name if are_timms else CUSTOM)


def class_labels(names: Sequence[Sequence[str]], class_names: Sequence[str] | None) -> Int[np.ndarray, " images"]:
    """The class of each image: the first of its names that is one; -1 where none is."""
    places = {name: place for place, name in enumerate(class_names or ())}
    return np.array([next((places[name] for name in some if name in places), -1) for some in names], np.int32)


def prune(
    weights: Weights,
    shares: Shares,
    images: Float[np.ndarray, "images height width channels"],
    labels: Int[np.ndarray, " images"],
) -> Weights:
    """The weights without the neurons and heads that matter least for the loss of some images, see `worth`.

    All blocks of a branch keep as many, each its own, in their order. The model computes what the whole one does with
    the others at zero.

    Args:
        shares: of the neurons and heads that are kept.
        images, labels: see `worth`.

    Raises ConversionError as `pruned_config`.
    """
    config = pruned_config(weights, shares)
    if config == weights.config:
        return weights
    found, tensors, notes = worth(weights, images, labels), dict(weights.tensors), []
    for place, (old, new) in enumerate(zip(weights.config.branches, config.branches, strict=True)):
        for kind, (what, _) in _KINDS.items():
            whole, left = _number(kind, old), _number(kind, new)
            if left < whole:
                for block in _blocks(weights.config, place):
                    kept = np.sort(np.argsort(-found[block, kind], kind="stable")[:left])
                    _CUTTERS[kind](tensors, block, old, kept)
                notes.append(f"{left} of {whole} {what} kept in each block of branch {place}")
    unknown = int(np.sum(labels < 0))
    others = f", {unknown} of them without a label: as what the model takes them for"
    notes.append(f"chosen by {len(images)} images{others * (unknown > 0)}")
    return dataclasses.replace(weights, config=config, tensors=tensors, notes=(*weights.notes, *notes))


def worth(
    weights: Weights, images: Float[np.ndarray, "images height width channels"], labels: Int[np.ndarray, " images"]
) -> Worth:
    """How much cross-entropy would change without each neuron and each head, to the first order.

    For one image that is |activation × gradient|, summed over the tokens (and over a head's channels) before the sign
    is dropped (arXiv 1611.06440); then the mean over the images.

    Args:
        images: normalised.
        labels: -1 where the class is not known: what the model takes the image for stands in for it.
    """
    config, (graphdef, _) = weights.config, abstract_model(weights.config)
    kernels = {
        f"{block}.{layer}": (block, kind, _number(kind, branch))
        for place, branch in enumerate(config.branches)
        for block in _blocks(config, place)
        for kind, (_, layer) in _KINDS.items()
    }
    tensors = {name: jnp.asarray(array, jnp.float32) for name, array in weights.tensors.items()}
    chosen = {name: tensors.pop(name) for name in kernels}

    def loss(chosen: dict[str, Any], rest: dict[str, Any], image: Any, label: Any) -> Any:
        model = nnx.merge(graphdef, nest({**rest, **chosen}))
        model.eval()
        logits = model(image[None])[0]
        return -jax.nn.log_softmax(logits)[jnp.where(label < 0, jnp.argmax(logits), label)]

    @jax.jit
    def of_one(chosen: dict[str, Any], rest: dict[str, Any], image: Any, label: Any) -> dict[str, Any]:
        gradients = jax.grad(loss)(chosen, rest, image, label)
        # over all tokens, an input times its gradient is a weight times its gradient, summed over the outputs
        inputs = {name: jnp.sum(chosen[name] * gradient, axis=0) for name, gradient in gradients.items()}
        return {name: jnp.abs(x.reshape(kernels[name][2], -1).sum(axis=1)) for name, x in inputs.items()}

    found = [of_one(chosen, tensors, image, label) for image, label in zip(images, labels, strict=True)]
    mean = jax.tree.map(lambda *all_of_them: np.mean(np.stack(all_of_them), axis=0), *found)
    return {kernels[name][:2]: values for name, values in mean.items()}


def _of_each_branch(kind: str, shares: Sequence[float], config: CrossViTConfig) -> Sequence[float]:
    count = len(config.branches)
    if len(shares) not in (1, count):
        raise ConversionError(f"{kind} takes one share, for the widest branch, or one for each of the {count} branches")
    return for_each_branch(shares, config.branches, 1.0)


def _with_share(kind: str, share: float, branch: Branch, place: int) -> Branch:
    """A branch with this share of its neurons or heads, rounded to the nearest number."""
    whole = _number(kind, branch)
    left = int(share * whole + 0.5)
    if kind == "heads" and branch.attention != "full" and share < 1:
        raise ConversionError(
            f"heads={share:g}: heads are cut out of full attention, and branch {place} has {branch.attention}"
        )
    if left < 1:
        raise ConversionError(f"{kind}={share:g} leaves none of the {whole} {_KINDS[kind][0]} of branch {place}")
    if left == whole:
        return branch
    if kind == "mlp":
        return dataclasses.replace(branch, mlp_ratio=mlp_ratio(branch.embed_dim, left))
    return dataclasses.replace(branch, num_heads=left, head_dim=branch.head_width)


def _number(kind: str, branch: Branch) -> int:
    """How many of them a block has."""
    return branch.hidden_dim if kind == "mlp" else branch.num_heads


def _blocks(config: CrossViTConfig, branch: int) -> list[str]:
    """The names of a branch's blocks."""
    depths = [depths[branch] for depths in config.stage_depths]
    return [f"blocks.{stage}.blocks.{branch}.{i}" for stage, depth in enumerate(depths) for i in range(depth)]


def _cut_neurons(tensors: dict[str, np.ndarray], block: str, branch: Branch, kept: Int[np.ndarray, " kept"]) -> None:
    for name, axis in (("fc1.weight", 0), ("fc1.bias", 0), ("fc2.weight", 1)):
        tensors[f"{block}.mlp.{name}"] = tensors[f"{block}.mlp.{name}"].take(kept, axis)


def _cut_heads(tensors: dict[str, np.ndarray], block: str, branch: Branch, kept: Int[np.ndarray, " kept"]) -> None:
    heads = (branch.num_heads, branch.head_width)
    for name in ("weight", "bias"):  # queries, keys and values of all heads, one after the other
        qkv = tensors.get(f"{block}.attn.qkv.{name}")
        if qkv is not None:
            cut = qkv.reshape(3, *heads, *qkv.shape[1:]).take(kept, axis=1)
            tensors[f"{block}.attn.qkv.{name}"] = cut.reshape(-1, *qkv.shape[1:])
    proj = tensors[f"{block}.attn.proj.weight"]
    tensors[f"{block}.attn.proj.weight"] = proj.reshape(-1, *heads).take(kept, axis=1).reshape(len(proj), -1)


_CUTTERS = {"mlp": _cut_neurons, "heads": _cut_heads}
