"""Changes weights to fit other settings: classes, image size, channels."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from convert.architecture import abstract_model
from convert.errors import ConversionError
from convert.tree import flatten
from convert.weights import Weights
from crossvit_jax.config import CrossViTConfig
from crossvit_jax.resize import antialiased_matrix, kernel_matrix

# what the weights were trained as, and cannot become something else
_FIXED = ("name", "embed_dim", "depth", "num_heads", "head_dim", "mlp_ratio", "attention")
_FIXED += ("patch_size", "fusion_depth", "multi_conv", "stages", "qkv_bias")


def adapt(weights: Weights, overrides: Mapping[str, Any], *, seed: int = 0) -> Weights:
    """The weights for the same model with some settings replaced.

    Another `num_classes` gets a new head, initialised as in a fresh model; 0 drops it. Another `image_size` or
    `image_scale` gets resampled position embeddings. Another `patch_size` gets those and resized kernels, as the model
    computes them when it is called with it. Another `in_chans` gets the summed or repeated first convolution. All other
    settings change no tensor. Each change of tensors is told in `notes`.

    Args:
        overrides: settings, see `CrossViTConfig.replace`.
        seed: of the new head.

    Raises:
        ConversionError: a setting has a value that makes no model, or would need other weights than these.
        TypeError: an override is no setting.
    """
    old = weights.config
    try:
        if "patch_size" in overrides and not {"image_size", "image_scale", "branches"} & set(overrides):
            old.at_patch_size(overrides["patch_size"])  # which tells what fits these images
        config = old.replace(**overrides)
    except ValueError as error:
        raise ConversionError(str(error)) from None
    # a branch's description is no wish for other patches than there are, see `load_weights`
    kept = [key for key in _FIXED if key != "patch_size" or key not in overrides or old.multi_conv]
    fixed = [f"{key} is {getattr(old, key)}" for key in kept if getattr(config, key) != getattr(old, key)]
    if fixed:
        raise ConversionError(f"in these weights {' and '.join(fixed)}; that cannot be changed")

    tensors, notes = dict(weights.tensors), list(weights.notes)
    class_names = weights.class_names
    if config.grid_size != old.grid_size:
        for branch, (before, after) in enumerate(zip(old.grid_size, config.grid_size, strict=True)):
            name = f"pos_embed_{branch}"
            tensors[name] = resample_pos_embed(tensors[name], before, after)
        grids = [" and ".join(f"{rows} x {columns}" for rows, columns in c.grid_size) for c in (old, config)]
        notes.append(f"position embeddings resampled from {grids[0]} patches to {grids[1]}")
    if config.patch_size != old.patch_size:
        for branch, size in enumerate(config.patch_size):
            name = f"patch_embed.{branch}.proj.weight"
            tensors[name] = resize_kernel(tensors[name], size)
        sizes = [" and ".join(map(str, c.patch_size)) for c in (old, config)]
        note = f"kernels resized from patches of {sizes[0]} pixels to {sizes[1]}"
        if config.patch_size not in (weights.patch_sizes or ()):
            note += ": weights that were not trained with such patches lose accuracy"
        notes.append(note)
    if config.in_chans != old.in_chans:
        for name in weights.tensors:
            if re.fullmatch(r"patch_embed\.\d+\.proj(\.0)?\.weight", name):
                tensors[name] = adapt_channels(tensors[name], config.in_chans)
        how = "summed" if config.in_chans == 1 else "repeated and scaled"
        notes.append(f"first convolutions {how} from {old.in_chans} to {config.in_chans} channels")
    if config.num_classes != old.num_classes:
        dtype = tensors["cls_token_0"].dtype
        tensors = {name: array for name, array in tensors.items() if not name.startswith("head.")}
        tensors |= {name: array.astype(dtype) for name, array in _new_head(config, seed).items()}
        class_names = None
        new = f"new head for {config.num_classes} classes instead of {old.num_classes}: it is untrained"
        notes.append(new if config.num_classes else f"head for {old.num_classes} classes dropped")
    return dataclasses.replace(weights, config=config, tensors=tensors, class_names=class_names, notes=tuple(notes))


def resample_pos_embed(
    embedding: Float[np.ndarray, "1 tokens dim"], old_grid: tuple[int, int], new_grid: tuple[int, int]
) -> Float[np.ndarray, "1 new_tokens dim"]:
    """Position embeddings for another grid of (rows, columns): bicubic, antialiased, computed in float64.

    The class token's stays as it is. As timm's `resample_abs_pos_embed`, and `crossvit_jax.resize`'s in a model.
    """
    if old_grid == new_grid:
        return embedding
    dim = embedding.shape[-1]
    rows, columns = map(antialiased_matrix, old_grid, new_grid)
    grid = embedding[0, 1:].astype(np.float64).reshape(*old_grid, dim)
    grid = np.einsum("or,rcd,pc->opd", rows, grid, columns, optimize=True)
    return np.concatenate([embedding[:, :1], grid.reshape(1, -1, dim).astype(embedding.dtype)], axis=1)


def resize_kernel(
    weight: Float[np.ndarray, "out channels size size"], size: int
) -> Float[np.ndarray, "out channels new_size new_size"]:
    """A kernel that cuts patches, for patches of another size, computed in float64.

    As timm's `resample_patch_embed`, and `crossvit_jax.resize`'s in a model.
    """
    if weight.shape[-1] == size:
        return weight
    matrix = kernel_matrix(weight.shape[-1], size)
    return (matrix @ weight.astype(np.float64) @ matrix.T).astype(weight.dtype)


def adapt_channels(
    weight: Float[np.ndarray, "out channels height width"], channels: int
) -> Float[np.ndarray, "out new_channels height width"]:
    """A first convolution for images with other channels, as timm's `adapt_input_conv`.

    For one channel, the sum over the old ones. For more, the old ones in turn, scaled so that the sum stays alike.
    """
    old = weight.shape[1]
    wide = weight.astype(np.float32)
    if channels == 1:
        return wide.sum(1, keepdims=True).astype(weight.dtype)
    return (wide[:, np.arange(channels) % old] * np.float32(old / channels)).astype(weight.dtype)


def _new_head(config: CrossViTConfig, seed: int) -> dict[str, np.ndarray]:
    """The tensors of a freshly initialised head, under timm's names; empty without classes."""
    model = nnx.merge(*abstract_model(config))  # shapes only: of the whole model, nothing but the head is made
    model.reset_classifier(config.num_classes, rngs=nnx.Rngs(seed))
    head = nnx.to_pure_dict(nnx.state(model.head, nnx.Param))
    return flatten({"head": jax.tree.map(jnp.asarray, head)})
