"""The `config.json` that timm puts beside weights: what it says of them and of their images.

Pooling, cropping and the names of the classes are taken over. Images are prepared in one way only so far: weights for
another are refused.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.errors import ConversionError, one_line
from crossvit_jax.config import CrossViTConfig, get_config
from crossvit_jax.files import read_json
from crossvit_jax.preprocess import MEAN, STD

FILE = "config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the names of the weights that it belongs to
_PREPARED = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "crop_mode": "center"}


def read_beside(weights: Path) -> dict[str, Any] | None:
    """What timm's file beside a file of weights says, by timm's names in one dict; None where there is none of it.

    Raises:
        ConversionError: it is damaged.
    """
    file = weights.with_name(FILE)
    try:
        said = read_json(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        if weights.name not in WEIGHTS:  # somebody else's
            return None
        raise ConversionError(f"{file} cannot be read: {getattr(error, 'strerror', None) or one_line(error)}") from None
    if not isinstance(said, dict):
        return None
    # older files have all in one dict; arguments of the model are what it was made with
    parts = (said.get("pretrained_cfg"), said, said.get("model_args"))
    flat = {key: value for part in parts if isinstance(part, dict) for key, value in part.items() if value is not None}
    if not isinstance(said.get("architecture"), str):
        if weights.name not in WEIGHTS or not flat.keys() & _PREPARED.keys():
            return None
        flat["architecture"] = ""  # it does not tell whose images it is about, and can mean these alone
    elif weights.name not in WEIGHTS and _variant(said["architecture"]) is None:
        return None
    return flat | {"label_names": flat.get("label_names", flat.get("labels"))}


def honour(
    config: CrossViTConfig, class_names: tuple[str, ...] | None, said: Mapping[str, Any]
) -> tuple[CrossViTConfig, tuple[str, ...] | None, list[str]]:
    """The settings and class names with what timm's file says, and notes on what it changed.

    Args:
        class_names: known from elsewhere, which count more.
        said: what `read_beside` returns.

    Raises:
        ConversionError: it belongs to another variant, or wants images prepared otherwise than is done here.
    """
    variant = _variant(said["architecture"])
    wrong = [] if variant in (None, config.name) else [f"architecture {said['architecture']}, not {config.name}"]
    wrong += _prepared_otherwise(said) if config.in_chans == 3 else []
    if wrong:
        raise ConversionError(f"the {FILE} beside it asks for {'; '.join(wrong)}: such weights are not read here")
    changes = {
        key: said[key]
        for key in ("crop_pct", "global_pool", "crop_scale")
        if key in said and said[key] != getattr(config, key)
    }
    crop_pct = changes.get("crop_pct", config.crop_pct)
    if not isinstance(crop_pct, int | float) or not crop_pct > 0:
        raise ConversionError(f"the {FILE} beside it has a crop_pct of {crop_pct!r}: it must be a number above 0")
    notes = [f"{key} {value}, as the {FILE} beside it says" for key, value in changes.items()]
    try:
        config = config.replace(**changes)
    except (ValueError, TypeError) as error:
        raise ConversionError(f"the {FILE} beside it: {one_line(error)}") from None
    size = said.get("input_size", ())
    if size and list(size) != [config.in_chans, *config.image_size]:
        notes.append(f"the {FILE} beside it is for images {_shown(size)}; the weights' own size is taken")
    if class_names is None and said["label_names"]:
        class_names = _names(said["label_names"], config.num_classes)
        if class_names is None:
            notes.append(f"the label_names in the {FILE} beside it are not taken: they are not {config.num_classes}")
    return config, class_names, notes


def check_flags(flags: Any) -> None:
    """Looks at the flags of timm's training script in its checkpoints, for what they say of the images.

    Raises ConversionError where these were prepared otherwise than here.
    """
    # an empty value stands for what timm knows of the variant, which is ours
    said = {key: value for key in _PREPARED if (value := getattr(flags, key, None))}
    wrong = _prepared_otherwise(said) if getattr(flags, "in_chans", None) in (None, 3) else []
    if wrong:
        raise ConversionError(f"it was trained with {'; '.join(wrong)}: such weights are not read here")


def _prepared_otherwise(said: Mapping[str, Any]) -> list[str]:
    """Both values of what is said of images and is not done so here."""
    return [
        f"{key} {_shown(said[key])}, not {_shown(ours)}"
        for key, ours in _PREPARED.items()
        if key in said and not _is_same(said[key], ours)
    ]


def _variant(architecture: str) -> str | None:
    try:
        return get_config(architecture).name
    except ValueError:
        return None


def _is_same(theirs: Any, ours: Any) -> bool:
    try:
        return theirs == ours or [round(float(x), 4) for x in theirs] == [round(x, 4) for x in ours]
    except (TypeError, ValueError):
        return False


def _names(labels: Any, count: int) -> tuple[str, ...] | None:
    """Names in the order of the outputs, from a list or from a dict by index."""
    if isinstance(labels, dict):
        labels = [labels.get(str(index)) for index in range(max(count, len(labels)))]
    fits = isinstance(labels, list) and len(labels) == count and None not in labels
    return tuple(map(str, labels)) if fits else None


def _shown(value: Any) -> str:
    return f"({', '.join(map(str, value))})" if isinstance(value, list | tuple) else str(value)
