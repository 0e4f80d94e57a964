"""The folder of a run: where it is, and the settings that it keeps."""

import dataclasses
import importlib.metadata
import json
import platform
import re
import time
from pathlib import Path
from typing import Any

import jax

from train.config import SettingsError, TrainConfig

_PACKAGES = ("jax", "flax", "optax", "grain", "tensorflow-datasets", "timm", "torch", "pillow", "numpy")


def check_output(config: TrainConfig) -> None:
    """Raises SettingsError if the folder asked for holds something already."""
    output = Path(config.output) if config.output else None
    if output is not None and output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise SettingsError(f"--output {output} exists and is not an empty folder: name a new one")


def create_run_folder(config: TrainConfig) -> Path:
    """Make the folder: `config.output`, or `runs/VARIANT-DATASET-TIME`. Raises SettingsError if that is impossible."""
    check_output(config)
    try:
        if config.output:
            folder = Path(config.output)
            folder.mkdir(parents=True, exist_ok=True)
            return folder
        dataset = re.sub(r"\W+", "-", Path(config.dataset).name.split(":")[-1]).strip("-")
        name = f"{config.variant}-{dataset}-{time.strftime('%Y%m%d-%H%M%S')}"
        for attempt in range(100):  # two runs may start in the same second
            folder = Path("runs") / (name if attempt == 0 else f"{name}-{attempt + 1}")
            try:
                folder.mkdir(parents=True)
                return folder
            except FileExistsError:
                continue
        raise FileExistsError(f"runs/{name} and a hundred more exist")
    except OSError as error:
        raise SettingsError(f"cannot make the run's folder: {error}") from error


def write_config(folder: Path, config: TrainConfig, **more: Any) -> None:
    """Write `config.json`: every setting as `train`, versions and devices, and `more`, all as plain JSON values."""
    content = {
        "train": dataclasses.asdict(config),
        **more,
        "devices": {
            "count": jax.device_count(),
            "kind": jax.devices()[0].device_kind,
            "platform": jax.default_backend(),
        },
        "versions": {
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in _PACKAGES},
        },
    }
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
