"""Which CrossViT a set of tensors is, told from names and shapes, and whether it is complete."""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from convert.errors import ConversionError
from convert.tree import leaves, timm_shape
from crossvit_jax import CrossViT
from crossvit_jax.config import (
    CUSTOM,
    TIMM_NAMES,
    VARIANTS,
    Branch,
    CrossViTConfig,
    DenseConfig,
    DetectorConfig,
    SegmenterConfig,
    mlp_ratio,
)
from crossvit_jax.detection import CrossViTDetector
from crossvit_jax.segmentation import CrossViTSegmenter

BODY = "backbone.body."  # before the names of the CrossViT's tensors in a detector or segmenter
PYRAMID = "backbone.pyramid."
_CLASSES = {CrossViTConfig: CrossViT, DetectorConfig: CrossViTDetector, SegmenterConfig: CrossViTSegmenter}

Shapes = Mapping[str, tuple[int, ...]]  # by timm's name
_DEEPEST_NAME = 12  # keys in the name of a tensor
_NAMED = 100  # groups of tensors in a message


class SameKey(nnx.Rngs):
    """Gives every parameter the same key. Abstract parameters need no other, and counting keys under a trace is slow:
    with this, an abstract model takes a third of the time."""

    def __init__(self):
        pass

    def params(self) -> Array:
        return jax.random.key(0)


def model_class(config: CrossViTConfig | DenseConfig) -> type[nnx.Module]:
    """The Flax class that these settings are of."""
    return _CLASSES[type(config)]


@functools.lru_cache(maxsize=16)
def abstract_model(
    config: CrossViTConfig | DenseConfig, dtype: Any = None, param_dtype: Any = jnp.float32
) -> nnx.GraphState:
    """The graph definition of the model, and its parameters as shapes in nested dicts; nothing is allocated.

    The result is shared: do not change it.
    """
    build = model_class(config)
    model = nnx.eval_shape(lambda: build(config, dtype=dtype, param_dtype=param_dtype, rngs=SameKey()))
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def expected_shapes(config: CrossViTConfig | DenseConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor in timm's state dict of this model, derived from the Flax module tree."""
    return dict(timm_shape(path, leaf.shape) for path, leaf in leaves(abstract_model(config)[1]))


def infer_config(
    shapes: Shapes, image_size: tuple[int, int] | None = None, branches: Sequence[Branch] | None = None
) -> CrossViTConfig | DenseConfig:
    """The settings that shapes tell: variant, image size and scale, patch size, channels, classes, qkv bias, and the
    neurons and heads that are left of a pruned model.

    Of a detector or segmenter also what stands on its body; the distances of a detector, which no shape tells, are the
    usual ones.

    Where tensors contradict one another, the variant that explains most of them wins, so that `check` names the rest.

    Args:
        image_size: of the images it was trained on, (height, width). It is needed for rectangular images only; the
            number of tokens of square ones tells their size.
        branches: of a model that is no variant: shapes do not tell the number of heads. The rest they tell.

    Raises:
        ConversionError: nothing in it looks like a CrossViT, or like a variant where no `branches` are given; or these
            make no model.
    """
    if any(name.startswith(PYRAMID) for name in shapes):
        return _dense_config(shapes, image_size, branches)
    if branches is not None:
        return _custom_config(shapes, image_size, tuple(branches))
    likeness = {name: _likeness(config, shapes) for name, config in VARIANTS.items()}
    best = max(likeness.values())
    count = sum(f"cls_token_{branch}" in shapes for branch in range(len(shapes)))
    if count > 2 or (count and best == 0):
        raise ConversionError(f"it has {count} branches, of no variant: give their settings (--branches, branches)")
    if best == 0:
        some = ", ".join(list(shapes)[:3])
        raise ConversionError(f"these {len(shapes)} tensors are no CrossViT ({some}, …); it would have cls_token_0, …")
    candidates = [_pruned(VARIANTS[name], shapes) for name in VARIANTS if likeness[name] == best]
    settings = _input_and_output(candidates[0], shapes)
    # those at 240 and at 408 pixels differ only in how much smaller the second image is
    sizes = _patch_sizes(shapes, candidates[0])
    geometries = [(config, _geometry(config, shapes, image_size, sizes)) for config in candidates]
    fitting = [pair for pair in geometries if pair[1].get("image_scale") == pair[0].image_scale]
    config, geometry = (fitting or geometries)[0]
    return config.replace(**geometry, **settings)


def _input_and_output(config: CrossViTConfig, shapes: Shapes) -> dict[str, Any]:
    """Channels, classes and qkv bias; the channels of the config where tensors do not tell them."""
    branches = range(len(config.branches))
    first_weights = [shapes.get(f"patch_embed.{b}.proj{conv}.weight", ()) for b in branches for conv in ("", ".0")]
    heads = [shapes.get(f"head.{b}.{leaf}", ()) for leaf in ("weight", "bias") for b in branches]
    return {
        "in_chans": next((shape[1] for shape in first_weights if len(shape) == 4), config.in_chans),
        "num_classes": next((shape[0] for shape in heads if shape), 0),
        "qkv_bias": any(name.endswith(("attn.qkv.bias", "attn.q.bias")) for name in shapes),
    }


def _custom_config(shapes: Shapes, image_size: tuple[int, int] | None, branches: tuple[Branch, ...]) -> CrossViTConfig:
    """The settings of a model with these branches, as far as shapes tell them."""
    sides = [(_square_side(shapes, i), branch) for i, branch in enumerate(branches)]
    sizes = [side * branch.patch_size / branch.image_scale for side, branch in sides if side]
    if image_size is None or len(sizes) == len(branches):  # a square, whatever size it shall get
        size = int(sizes[0]) if sizes else 240
        image_size = (size, size)
    names = [name.split(".") for name in shapes if re.match(r"blocks\.\d{1,4}\.fusion\.0\.\d{0,4}\b", name, re.ASCII)]
    stages = 1 + max((int(name[1]) for name in names), default=-1)
    fusions = [[int(name[4]) for name in names if name[1] == str(i) and name[4].isdigit()] for i in range(stages)]
    try:
        config = CrossViTConfig(
            name=CUSTOM,
            branches=branches,
            fusion_depth=tuple(1 + max(numbers, default=-1) for numbers in fusions) or 0,
            multi_conv="patch_embed.0.proj.0.weight" in shapes,
            image_size=image_size,
        )
        return config.replace(**_input_and_output(config, shapes))
    except ValueError as error:
        raise ConversionError(str(error)) from None


def _dense_config(shapes: Shapes, image_size: tuple[int, int] | None, branches: Sequence[Branch] | None) -> DenseConfig:
    """The settings of a detector or segmenter."""
    of_body = {name.removeprefix(BODY): shape for name, shape in shapes.items() if name.startswith(BODY)}
    backbone = infer_config(of_body, image_size, branches)

    def count(pattern: str, rank: int = 4) -> int:
        return sum(re.fullmatch(pattern, name) is not None and len(shape) == rank for name, shape in shapes.items())

    try:
        levels = count(rf"{re.escape(PYRAMID)}levels\.\d+\.conv1\.weight")
        stride = backbone.patch_size[0] / backbone.image_scale[0]
        first = int(stride) // 2 if f"{PYRAMID}levels.0.up.weight" in shapes else int(stride)
        settings = {"backbone": backbone, "strides": tuple(first * 2**level for level in range(levels))}
        settings["width"] = shapes[f"{PYRAMID}levels.0.conv1.weight"][0]
        if any(name.startswith("head.") for name in shapes):
            convs = count(r"head\.regression_head\.conv\.\d+\.weight")
            classes = shapes["head.classification_head.cls_logits.bias"][0]
            return DetectorConfig(**settings, num_classes=classes, num_convs=convs)
        if "decoder.cls_emb" in shapes:
            blocks = count(r"decoder\.blocks\.\d+\.attn\.qkv\.weight", rank=2)
            classes = shapes["decoder.cls_emb"][1]
            return SegmenterConfig(**settings, num_classes=classes, decoder="mask", num_blocks=blocks)
        scse = "decoder.scse.reduce.weight" in shapes
        return SegmenterConfig(**settings, num_classes=shapes["decoder.classifier.bias"][0], scse=scse)
    except KeyError as error:
        raise ConversionError(f"it looks like a detector or a segmenter, but has no {error.args[0]}") from None
    except (ValueError, IndexError) as error:
        raise ConversionError(f"it looks like a detector or a segmenter, but: {error}") from None


def check(shapes: Shapes, config: CrossViTConfig | DenseConfig, what: str) -> None:
    """Whether the tensors are exactly those of the model.

    Raises:
        ConversionError: names all that are missing, unexpected or mis-shaped, and the variant that they fit best.
    """
    of_body = config.backbone if isinstance(config, DenseConfig) else config
    blocks = sum(map(sum, of_body.stage_depths)) + sum(of_body.fusion_depths)
    if blocks > len(shapes):  # before the model is made, which takes the longer the more blocks it has
        raise ConversionError(
            f"{what} does not fit its settings: they are of {blocks} blocks, and it has {len(shapes)} tensors"
        )
    expected = expected_shapes(config)
    missing = [name for name in expected if name not in shapes]
    unexpected = [name for name in shapes if name not in expected]
    common = [name for name in expected if name in shapes]
    misshaped = [name for name in common if shapes[name] != expected[name]]
    details = {name: f" {shapes[name]} instead of {expected[name]}" for name in misshaped}
    kinds = (("missing", missing, expected), ("unexpected", unexpected, shapes), ("mis-shaped", misshaped, common))
    faults = [f"{len(names)} {kind} ({_named(names, among, details)})" for kind, names, among in kinds if names]
    if not faults:
        return
    of_body = {name.removeprefix(BODY): shape for name, shape in shapes.items()}
    if any(_square_side(of_body, branch) == 0 for branch in range(len(config.branches))):
        faults.append("no square image has that many patches: a rectangle needs image_size (--image-size HxW)")
    near = f"its settings ({config.name}{f', {config.task}' if isinstance(config, DenseConfig) else ''})"
    if config.name in TIMM_NAMES and not isinstance(config, DenseConfig):
        near = f"{config.name} ({TIMM_NAMES[config.name]}), the nearest variant"
    raise ConversionError(f"{what} does not fit {near}: {'; '.join(faults)}")


def _landmarks(config: CrossViTConfig) -> Iterator[tuple[str, tuple[int, ...] | None]]:
    """Tensors that tell the variants apart by their shapes, or (None) by not being there."""
    for branch, settings in enumerate(config.branches):
        dim, hidden_dim = settings.embed_dim, settings.hidden_dim
        yield f"cls_token_{branch}", (1, 1, dim)
        yield f"norm.{branch}.weight", (dim,)
        yield f"patch_embed.{branch}.proj.bias", None if config.multi_conv else (dim,)
        yield f"patch_embed.{branch}.proj.4.bias", (dim,) if config.multi_conv else None
        for stage, depths in enumerate(config.stage_depths):
            yield f"blocks.{stage}.blocks.{branch}.{depths[branch] - 1}.mlp.fc1.weight", (hidden_dim, dim)
            yield f"blocks.{stage}.blocks.{branch}.{depths[branch] - 1}.mlp.fc2.bias", (dim,)  # of pruned ones too
            yield f"blocks.{stage}.blocks.{branch}.{depths[branch]}.mlp.fc1.weight", None


def _likeness(config: CrossViTConfig, shapes: Shapes) -> int:
    """How many of the variant's landmarks are as they should be; 0 if only by not being there."""
    as_expected = [shape for name, shape in _landmarks(config) if shapes.get(name) == shape]
    return len(as_expected) if any(as_expected) else 0


def _pruned(config: CrossViTConfig, shapes: Shapes) -> CrossViTConfig:
    """The variant with the neurons, heads and attention that the blocks of each branch have, where these are others."""
    branches = []
    for place, branch in enumerate(config.branches):
        hidden = _most_common(shapes, rf"blocks\.\d+\.blocks\.{place}\.\d+\.mlp\.fc2\.weight")
        if hidden and hidden < branch.hidden_dim:
            branch = dataclasses.replace(branch, mlp_ratio=mlp_ratio(branch.embed_dim, hidden))
        width = _most_common(shapes, rf"blocks\.\d+\.blocks\.{place}\.\d+\.attn\.proj\.weight")
        if width and width < branch.embed_dim and width % branch.head_width == 0:
            branch = dataclasses.replace(branch, num_heads=width // branch.head_width, head_dim=branch.head_width)
        first = f"blocks.0.blocks.{place}.0.attn"
        if shapes.get(f"{first}.qkv.weight", ())[:1] == (1 + 2 * branch.embed_dim,):
            branch = dataclasses.replace(branch, attention="separable", head_dim=None)
        if len(kernel := shapes.get(f"{first}.sr.weight", ())) == 4 and kernel[2] > 1:
            branch = dataclasses.replace(branch, attention=f"spatial-reduction:{kernel[2]}", head_dim=None)
        branches.append(branch)
    are_timms = all(branch.is_timms for branch in branches)
    return config.replace(branches=branches, name=config.name if are_timms else CUSTOM)


def _most_common(shapes: Shapes, pattern: str) -> int | None:
    """The commonest number of inputs of the linear layers whose names match; None where there is none."""
    inputs = [shape[1] for name, shape in shapes.items() if len(shape) == 2 and re.fullmatch(pattern, name, re.ASCII)]
    return Counter(inputs).most_common(1)[0][0] if inputs else None


def _square_side(shapes: Shapes, branch: int) -> int | None:
    """Patches along one side of the square image of a branch; 0 if no square has that many, None if not known."""
    shape = shapes.get(f"pos_embed_{branch}", ())
    if len(shape) != 3 or shape[1] < 2:
        return None
    side = math.isqrt(shape[1] - 1)
    return side if side * side == shape[1] - 1 else 0


def _patch_sizes(shapes: Shapes, config: CrossViTConfig) -> tuple[int, ...]:
    """The sides of the kernels that embed patches; those of a config where three convolutions do, or there is none."""
    kernels = [shapes.get(f"patch_embed.{branch}.proj.weight", ()) for branch in range(len(config.branches))]
    told = [shape[2] if len(shape) == 4 and shape[2] == shape[3] else 0 for shape in kernels]
    return tuple(size or usual for size, usual in zip(told, config.patch_size, strict=True))


def _geometry(
    config: CrossViTConfig, shapes: Shapes, image_size: tuple[int, int] | None, patch_size: tuple[int, ...]
) -> dict[str, Any]:
    """Image size and scale of a variant, and its patches where they are others, that explain the position embeddings;
    empty where they tell nothing."""
    sides = [_square_side(shapes, branch) for branch in (0, 1)]
    patches = {"patch_size": patch_size} if patch_size != config.patch_size else {}
    if all(sides):
        size, other = (side * patch for side, patch in zip(sides, patch_size, strict=True))
        return {"image_size": (size, size), "image_scale": (Fraction(1), Fraction(other, size)), **patches}
    if image_size is None or None in sides:
        return {}
    counts = [shapes[f"pos_embed_{branch}"][1] - 1 for branch in (0, 1)]
    area = Fraction(counts[1] * patch_size[1] ** 2, math.prod(image_size))  # branch 1's share of the image's
    scale = Fraction(math.isqrt(area.numerator), math.isqrt(area.denominator))
    try:
        given = config.replace(image_size=image_size, image_scale=(Fraction(1), scale), patch_size=patch_size)
    except ValueError:
        return {}
    fits = counts == [rows * columns for rows, columns in given.grid_size]
    return {"image_size": given.image_size, "image_scale": given.image_scale, **patches} if fits else {}


def _named(names: list[str], among: Collection[str], details: Mapping[str, str]) -> str:
    """The names in one line; many of them as `blocks.2.* (98)` where everything below is meant."""
    if len(names) <= 12:
        return ", ".join(name + details.get(name, "") for name in names)
    named, all_names = (Counter(prefix for name in some for prefix in _prefixes(name)) for some in (names, among))
    groups: dict[str, list[str]] = {}
    for name in names:
        widest = next((prefix for prefix in _prefixes(name) if named[prefix] == all_names[prefix]), name)
        groups.setdefault(widest, []).append(name)
    parts = []
    for group, members in groups.items():
        first = members[0] + details[members[0]] if members[0] in details else ""
        if members == [group]:
            parts.append(first or group)
        else:
            parts.append(f"{group}.* ({len(members)}{', such as ' + first if first else ''})")
    return ", ".join(parts[:_NAMED]) + f" and {len(parts) - _NAMED} more" * (len(parts) > _NAMED)


def _prefixes(name: str) -> Iterator[str]:
    """The dotted prefixes of a name, the shortest first: at most as many as a parameter's name has."""
    keys = name.split(".", _DEEPEST_NAME)
    return (".".join(keys[:length]) for length in range(1, len(keys)))
