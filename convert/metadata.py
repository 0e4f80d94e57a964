"""What our own files say about themselves beside the tensors: the settings, and the names of the classes.

Shapes alone do not tell heads, a rectangular image, dropout rates or the pooling; files from elsewhere have no more.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Mapping
from typing import Any, get_args

import numpy as np

from convert.errors import ConversionError
from convert.weights import Weights
from crossvit_jax.config import (
    BRANCH_SETTINGS,
    CONFIGS,
    CUSTOM,
    VARIANTS,
    Branch,
    CrossViTConfig,
    DenseConfig,
    read_fraction,
    shown_value,
)
from crossvit_jax.preprocess import MEAN, STD, Exif

KEY = "crossvit"  # in the header of a safetensors file; the name of the item in an Orbax folder
ORIGIN = "crossvit-origin"  # in a safetensors header: where the weights come from, in words for the user
DIGEST = "crossvit-sha256"  # in a safetensors header, see `digest`
FORMAT = 2  # 1 knew two branches only, whose settings were pairs; it is read as well
_FIRST_SETTINGS = BRANCH_SETTINGS[:6]  # those of format 1
_EXIF, _TASK, _PATCH_SIZES, _ENTROPIES = "exif", "task", "patch_sizes", "entropies"
_FIXED = {"mean": list(MEAN), "std": list(STD)}  # what all models have so far
_CONFIGS = {"classification": CrossViTConfig, **CONFIGS}


def describe(
    config: CrossViTConfig | DenseConfig,
    class_names: tuple[str, ...] | None,
    exif: Exif | None = None,
    patch_sizes: tuple[tuple[int, ...], ...] | None = None,
    entropies: tuple[float, ...] | None = None,
) -> dict:
    """The settings as JSON values; fractions become strings such as "14/15".

    A variant whose heads, widths or depths were changed is named as what it is, a model of one's own.

    Args:
        exif: what training did with EXIF orientations; None is not written.
        patch_sizes: those that training drew from, where there were several; None is not written.
        entropies: that part the training pictures evenly among these, rising; None is not written.
    """
    settings = dataclasses.asdict(config)
    of_body = settings.get("backbone", settings)
    if of_body["reduce_tokens"] is None:  # earlier versions know no such setting
        del of_body["reduce_tokens"]
    if _unlike_variant(getattr(config, "backbone", config)):
        of_body["name"] = CUSTOM
    for branch in of_body["branches"]:
        branch["image_scale"] = str(branch["image_scale"])
        for name, value in (("head_dim", None), ("attention", "full")):  # likewise
            if branch[name] == value:
                del branch[name]
    known = {"config": settings, "class_names": class_names and list(class_names)}
    told = {_EXIF: exif, _PATCH_SIZES: patch_sizes and [list(sizes) for sizes in patch_sizes]}
    told[_ENTROPIES] = entropies and list(entropies)
    known |= {key: value for key, value in told.items() if value is not None}
    return {"format": FORMAT, _TASK: config.task, **_FIXED, **known}


def describe_weights(weights: Weights) -> dict:
    """All that weights know of themselves, see `describe`."""
    return describe(weights.config, weights.class_names, weights.exif, weights.patch_sizes, weights.entropies)


def summary(weights: Weights) -> dict[str, Any]:
    """What an exported file tells those who do not have this library, as plain values; and our own description."""
    config = weights.config
    about = {
        "variant": config.name,
        "class_names": weights.class_names and list(weights.class_names),
        "input": "normalised float32 images (batch, channels, height, width) of image_size",
        "image_size": config.image_size,
        **_fitted(config),
        "license": weights.license,
        "library": f"crossvit-jax {version('crossvit-jax')}",
        KEY: json.dumps(describe_weights(weights)),
    }
    about |= {"mean": MEAN, "std": STD} if config.in_chans == 3 else {}
    return about | ({} if weights.exif is None else {_EXIF: weights.exif})


def _fitted(config: CrossViTConfig | DenseConfig) -> dict[str, Any]:
    """How evaluation brings a picture to the size of the model's images."""
    if config.task == "classification":
        return {"crop_pct": config.crop_pct}
    fit = "the longer side resized to that of the images, the rest filled up right and below with ImageNet's mean"
    points = {"strides": config.strides, "level_grids": config.level_grids} if config.task == "detection" else {}
    return {"task": config.task, "fit": fit, **points}


def version(package: str) -> str:
    """The version of a package; "unknown" where that is not installed and only lies on Python's path."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def understand(description: dict | str) -> tuple[CrossViTConfig | DenseConfig, tuple[str, ...] | None]:
    """The settings and class names of `describe`, or of its JSON text.

    Raises:
        ConversionError: it is of a newer format, damaged, or has a key that is not known.
    """
    try:
        if isinstance(description, str):
            description = json.loads(description)
        if not isinstance(description["format"], int) or description["format"] < 1:
            raise ValueError(f"its format is {shown_value(description['format'])}")
        if description["format"] > FORMAT:
            raise ConversionError(f"it was written by a newer version (format {description['format']})")
        is_first = description["format"] == 1
        fixed = {} if is_first else _FIXED
        later = () if is_first else (_TASK, _PATCH_SIZES, _ENTROPIES)
        _refuse_unknown(description, ("format", *fixed, *later, "config", "class_names", _EXIF))
        recorded_patch_sizes(description)
        recorded_entropies(description)
        for key, value in fixed.items():
            if description[key] != value:
                raise ConversionError(f"its {key} is {description[key]}; this version knows only {value}")
        task = "classification" if is_first else description[_TASK]
        if task not in _CONFIGS:
            raise ConversionError(f"its {_TASK} is {task}; this version knows only {', '.join(_CONFIGS)}")
        if description.get(_EXIF) not in (None, *get_args(Exif)):
            known = " and ".join(get_args(Exif))
            raise ConversionError(f"its {_EXIF} is {description[_EXIF]!r}; this version knows only {known}")
        settings = dict(description["config"])
        if is_first:
            columns = [settings.pop(name) for name in _FIRST_SETTINGS]
            settings["branches"] = [dict(zip(_FIRST_SETTINGS, row, strict=True)) for row in zip(*columns, strict=True)]
        config = _config(_CONFIGS[task], settings)
        backbone = getattr(config, "backbone", config)
        unlike = _unlike_variant(backbone)  # heads, above all, are in no shape: others would be computed with
        if unlike:
            raise ConversionError(f"its {KEY!r} metadata names the variant {backbone.name} with {unlike}")
        return config, _class_names(description["class_names"], config.num_classes)
    except ConversionError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ConversionError(f"its {KEY!r} metadata is damaged: {type(error).__name__}: {error}") from None


def _class_names(names: Any, count: int) -> tuple[str, ...] | None:
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"class_names are a list of texts; got {shown_value(names)}")
    if len(names) != count:
        raise ConversionError(f"its {KEY!r} metadata names {len(names)} classes, and there are {count}")
    return tuple(names)


def _unlike_variant(config: CrossViTConfig) -> str | None:
    """The first setting that makes a model another one than the variant whose name it has; None where none does."""
    usual = VARIANTS.get(config.name, config)
    # not patch_size and mlp_ratio: kernels are resized, neurons pruned, and timm too builds its variants with others
    names = ("embed_dim", "depth", "num_heads", "head_dim", "attention", "multi_conv", "stages")
    unlike = (name for name in names if getattr(config, name) != getattr(usual, name))
    return next((f"{name} {getattr(config, name)}, not {getattr(usual, name)}" for name in unlike), None)


def recorded_exif(description: dict | str) -> Exif | None:
    """What training did with EXIF orientations, in what `understand` understood; None: it does not tell."""
    return (json.loads(description) if isinstance(description, str) else description).get(_EXIF)


def recorded_patch_sizes(description: dict | str) -> tuple[tuple[int, ...], ...] | None:
    """The patch sizes that training drew from, likewise. Raises ConversionError if they are none."""
    sizes = (json.loads(description) if isinstance(description, str) else description).get(_PATCH_SIZES)
    if sizes is None:
        return None
    if not all(isinstance(size, int) and size >= 1 for branches in sizes for size in branches):
        raise ConversionError(f"its {_PATCH_SIZES} are {sizes}, which are no sizes")
    return tuple(map(tuple, sizes))


def recorded_entropies(description: dict | str) -> tuple[float, ...] | None:
    """The entropies that part the training pictures among the patch sizes, likewise. Raises ConversionError if they do
    not."""
    told = json.loads(description) if isinstance(description, str) else description
    bits = told.get(_ENTROPIES)
    if bits is None:
        return None
    if not isinstance(bits, list) or not all(isinstance(x, int | float) and 0 <= x <= 8 for x in bits):
        raise ConversionError(f"its {_ENTROPIES} are {shown_value(bits)}, which are no bits of 256 grey levels")
    if bits != sorted(bits) or len(bits) + 1 != len(told.get(_PATCH_SIZES) or ()):
        raise ConversionError(f"its {_ENTROPIES} {shown_value(bits)} do not part its {_PATCH_SIZES}")
    return tuple(map(float, bits))


def _config(build: type, settings: dict[str, Any]) -> CrossViTConfig | DenseConfig:
    _refuse_unknown(settings, [field.name for field in dataclasses.fields(build)])
    values = {key: _from_json(value) for key, value in settings.items()}
    if "backbone" in settings:
        values["backbone"] = _config(CrossViTConfig, dict(settings["backbone"]))
    else:
        values["branches"] = tuple(map(_branch, settings["branches"]))
    return build(**values)


def _branch(settings: Mapping[str, Any]) -> Branch:
    _refuse_unknown(settings, BRANCH_SETTINGS)
    values = {key: _from_json(value) for key, value in settings.items()}
    scale = values.get("image_scale")
    return Branch(**values | ({"image_scale": read_fraction(scale)} if isinstance(scale, str) else {}))


def _from_json(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _refuse_unknown(given: Mapping[str, Any], known: Iterable[str]) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ConversionError(f"its {KEY!r} metadata has unknown keys: {', '.join(unknown)}")


def with_digest(arrays: Mapping[str, np.ndarray], about: Mapping[str, str]) -> dict[str, str]:
    """The texts of a safetensors header with the digest of arrays and texts."""
    return {**about, DIGEST: digest(arrays, about)}


def digest(arrays: Mapping[str, np.ndarray], about: Mapping[str, str]) -> str:
    """Of all arrays by name, whatever their order, and of texts beside them, in hexadecimal (SHA-256)."""
    found = hashlib.sha256(json.dumps(dict(about), sort_keys=True).encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        found.update(json.dumps([name, array.dtype.name, array.shape]).encode())
        found.update(memoryview(array.reshape(-1).view(np.uint8)))
    return found.hexdigest()
