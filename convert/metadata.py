"""What our own files say about themselves beside the tensors: the settings, and the names of the classes.

Shapes alone do not tell a rectangular image, dropout rates or the pooling; files from elsewhere have no more.
"""

import dataclasses
import importlib.metadata
import json
from fractions import Fraction

from convert.errors import ConversionError
from crossvit_jax.config import CrossViTConfig

KEY = "crossvit"  # in the header of a safetensors file; the name of the item in an Orbax folder
FORMAT = 1


def describe(config: CrossViTConfig, class_names: tuple[str, ...] | None) -> dict:
    """The settings as JSON values; fractions become strings such as "14/15"."""
    settings = dataclasses.asdict(config) | {"image_scale": [str(scale) for scale in config.image_scale]}
    return {"format": FORMAT, "config": settings, "class_names": class_names and list(class_names)}


def to_json(config: CrossViTConfig, class_names: tuple[str, ...] | None) -> str:
    """`describe` as text, for formats whose metadata is text."""
    return json.dumps(describe(config, class_names))


def version(package: str) -> str:
    """The version of a package; "unknown" where that is not installed and only lies on Python's path."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def understand(description: dict | str) -> tuple[CrossViTConfig, tuple[str, ...] | None]:
    """The settings and class names of `describe`, or of its JSON text.

    Raises:
        ConversionError: it is of a newer format, or damaged.
    """
    try:
        if isinstance(description, str):
            description = json.loads(description)
        if description["format"] > FORMAT:
            raise ConversionError(f"it was written by a newer version (format {description['format']})")
        settings = {key: tuple(v) if isinstance(v, list) else v for key, v in description["config"].items()}
        settings["image_scale"] = tuple(Fraction(scale) for scale in settings["image_scale"])
        names = description["class_names"]
        return CrossViTConfig(**settings), names and tuple(map(str, names))
    except ConversionError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise ConversionError(f"its {KEY!r} metadata is damaged: {type(error).__name__}: {error}") from None
