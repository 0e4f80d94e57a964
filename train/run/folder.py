"""The folder of a run: where it is, who may write to it, and the settings that it keeps."""

import dataclasses
import errno
import fcntl
import json
import os
import platform
import re
import shutil
import time
from pathlib import Path
from typing import Any

from convert.errors import SettingsError, UserError, one_line
from convert.files import home_path, write_whole
from convert.formats.run_folder import CHECKPOINTS, split_kind
from crossvit_jax.config import BRANCH_SETTINGS
from crossvit_jax.files import read_json
from train.config import TrainConfig
from train.run.provenance import command_line, commit

_PACKAGES = ("crossvit-jax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "timm")
_PACKAGES += ("pillow", "numpy")
_CONFIG, _LOCK = "config.json", ".lock"
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)  # what file systems without locks answer
# what may differ when a run is continued: none of it changes what is computed
_FREE = {"output", "data_dir", "dataset", "init", "resume", "workers", "mesh", "coordinator", "num_processes"}
_FREE |= {
    "process_id",
    "join_timeout",
    "attention_kernel",
    "checkpoint_every",
    "max_bad_images",
    "max_pixels",
    "patience",
    "wandb",
}
# settings that came later, and by default change nothing
_LATER = {"task", "decoder", "width", "num_convs", "distances", "scale_jitter", "color_jitter", "dice", "ignore_index"}
_LATER |= {"patch_sizes", "reduce_tokens", "vflip", "class_weights", "fp32_residual"}
_LATER |= {"method", "mask_cell", "mask_ratio", "local_crops", "local_scale", "prototypes", "weight_decay_end"}
_LATER |= {"distill", "distill_alpha", "distill_temperature", "teacher_momentum"}


class CheckpointError(UserError):
    """A checkpoint cannot be written, or none can be read; the message is one line."""

    status = 1


def read_run(output: str | None) -> dict[str, Any] | None:
    """The `config.json` of the run in a folder, or None if a new run may start there.

    Raises SettingsError if the folder holds something else.
    """
    if output is None:
        return None
    folder = Path(output)
    try:
        if not os.path.lexists(folder) or (folder.is_dir() and _is_unused(folder)):
            return None
        saved = read_json(folder / _CONFIG)
    except (FileNotFoundError, NotADirectoryError):
        raise SettingsError(f"--output {folder} holds something, but no run to continue: name a new folder") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise SettingsError(f"cannot read {folder / _CONFIG}: {reason}") from error
    parts = ("train", "model", "data")
    if (
        not isinstance(saved, dict)
        or "train" not in saved
        or not all(isinstance(saved.get(p, {}), dict) for p in parts)
    ):
        raise SettingsError(f"{folder / _CONFIG} was written by another program: name a new folder")
    _rename_fingerprint(saved.get("data", {}))
    return saved


def _rename_fingerprint(data: dict[str, Any]) -> None:
    """Scenes of digits as they are called today: earlier versions named the seed, too, which changes none of them."""
    scenes = re.fullmatch(r"digit scenes 1 (\w+) seed=\d+", str(data.get("fingerprint")))
    if scenes:
        data["fingerprint"] = f"digit scenes 2 {scenes[1]}"


def read_settings(folder: str) -> TrainConfig:
    """The settings of the run in a folder. Raises SettingsError if there is none, or one of another version."""
    saved = read_run(folder)
    if saved is None:
        raise SettingsError(f"there is no run in {folder}")
    return dataclasses.replace(_settings(saved["train"], f"the run in {folder}"), output=folder)


def read_settings_file(file: str) -> TrainConfig:
    """The settings that a run was begun with, from its `config.json`.

    Raises SettingsError if the file cannot be read, is no such file, or is one of another version.
    """
    try:
        saved = read_json(Path(file))
    except (OSError, ValueError) as error:
        raise SettingsError(f"cannot read {file}: {getattr(error, 'strerror', None) or one_line(error)}") from error
    if not (isinstance(saved, dict) and isinstance(saved.get("train"), dict)):
        raise SettingsError(f"{file} is not the config.json of a run: it has no settings under the name train")
    return _settings(begun_settings(saved), f"the run that wrote {file}")


def _settings(values: dict[str, Any], run: str) -> TrainConfig:
    try:
        return TrainConfig(
            **{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        )
    except (KeyError, TypeError) as error:
        raise SettingsError(f"{run} was started by another version: {error}") from error


def begun_settings(saved: dict[str, Any]) -> dict[str, Any]:
    """The settings that a run was begun with, and what it did if there were not all of today's.

    Args:
        saved: what `read_run` returned.
    """
    settings = saved.get("train", {})
    before = {"augment_on": "host", "exif": "keep", "deterministic": False, "mix_group": settings.get("batch_size")}
    later = {field.name: field.default for field in dataclasses.fields(TrainConfig) if field.name in _LATER}
    return before | json.loads(json.dumps(later)) | settings  # as JSON has them: lists


def run_behind(source: str) -> str | None:
    """The folder of the run that weights come from: the source, or where its file or checkpoint lies; None: of none."""
    from convert.formats.hub import PREFIXES  # late: flags read the settings of a run, too

    if source.startswith(PREFIXES):
        return None
    path = Path(home_path(split_kind(source)[0]))
    for folder in (path, path.parent, *([path.parent.parent] if path.parent.name == CHECKPOINTS else [])):
        try:
            saved = read_json(folder / _CONFIG)
        except (OSError, ValueError):
            continue
        if isinstance(saved, dict) and isinstance(saved.get("train"), dict):
            return str(folder)
    return None


def check_same_run(saved: dict[str, Any], described: dict[str, Any], output: str | None) -> None:
    """Raises SettingsError, showing each difference, if a run that was begun otherwise would be continued.

    Args:
        saved: what `read_run` returned.
        described: what `describe_run` says of the run that shall continue it.
    """
    differences = []
    named = {**saved.get("train", {}), **described["train"]}
    begun = {**saved, "train": {name: value for name, value in begun_settings(saved).items() if name in named}}
    models = begun.get("model", {}), described["model"]
    if models[0] != models[1]:  # or the same in another format
        begun["model"], model = map(_model_settings, models)
        described = {**described, "model": model}
    for part in ("train", "model", "data"):
        # through JSON, where tuples are lists
        old, new = _flat(begun.get(part, {})), _flat(json.loads(json.dumps(described[part])))
        differences += [
            f"{name.rpartition('.')[2]} was {old.get(name)!r} and is {new.get(name)!r}"
            for name in sorted(old | new)
            if old.get(name) != new.get(name) and name not in _FREE
        ]
    if differences:
        shown = "; ".join(differences[:6]) + (f"; and {len(differences) - 6} more" if differences[6:] else "")
        raise SettingsError(
            f"the run in {output} cannot be continued with other settings: {shown[:1000]}; a new run, with an --output "
            f"of its own, can start from its weights: --init {output}"
        )


def _model_settings(description: dict[str, Any]) -> dict[str, Any]:
    """What a description of a model says, in whatever format it was written."""
    from convert.metadata import understand  # late: flags read the settings of a run, too

    config, class_names = understand(description)
    backbone, settings = getattr(config, "backbone", config), {}  # a detector or segmenter has one
    for part in (backbone, config):  # what both have is the latter's, such as the number of classes
        names = [field.name for field in dataclasses.fields(part) if field.name not in ("branches", "backbone")]
        settings |= {name: getattr(part, name) for name in names}
    settings |= {name: getattr(backbone, name) for name in BRANCH_SETTINGS} | {"class_names": class_names}
    return json.loads(json.dumps(settings, default=str))  # as JSON has it: lists, and fractions as text


def describe_run(config: TrainConfig, *, model: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """What `config.json` keeps: every setting as `train`, model, data, devices, versions, commit and command line."""
    import jax  # late, as above

    from convert.metadata import version

    return {
        "train": dataclasses.asdict(config),
        "model": model,
        "data": data,
        "devices": {
            "count": jax.device_count(),
            "kind": jax.devices()[0].device_kind,
            "platform": jax.default_backend(),
        },
        "versions": {"python": platform.python_version(), **{package: version(package) for package in _PACKAGES}},
        "commit": commit(),
        "command": command_line(),
    }


def write_config(folder: Path, described: dict[str, Any]) -> None:
    """Write `config.json` whole."""
    write_whole(folder / _CONFIG, (json.dumps(described, indent=2) + "\n").encode())


def newest_checkpoint(folder: Path) -> int:
    """The step of the newest checkpoint in a run's folder, whole or damaged, without opening it; 0: there is none.

    Raises CheckpointError if that cannot be told, or only damaged ones that were put aside are left.
    """
    try:
        names = os.listdir(folder / CHECKPOINTS)
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise CheckpointError(f"cannot keep checkpoints in {folder / CHECKPOINTS}: {error.strerror}") from error
    newest = max((int(name) for name in names if name.isdecimal()), default=0)
    if not newest and any(".damaged" in name for name in names):
        raise CheckpointError(f"all checkpoints in {folder / CHECKPOINTS} are damaged")
    return newest


def claim_run_folder(config: TrainConfig) -> "Claim":
    """Make the folder `config.output`, or `runs/VARIANT-DATASET-TIME`, and take it.

    Raises SettingsError if that is impossible, or another run has it.
    """
    try:
        if config.output:
            folder = Path(config.output)
            is_new = not folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
            return Claim(folder, is_new=is_new)
        dataset = re.sub(r"\W+", "-", Path(config.dataset).name.split(":")[-1]).strip("-")
        name = f"{config.variant}-{dataset}-{time.strftime('%Y%m%d-%H%M%S')}"
        for attempt in range(100):  # two runs may start in the same second
            folder = Path("runs") / (name if attempt == 0 else f"{name}-{attempt + 1}")
            try:
                folder.mkdir(parents=True)
                return Claim(folder, is_new=True)
            except FileExistsError:
                continue
        raise FileExistsError(f"runs/{name} and a hundred more exist")
    except OSError as error:
        raise SettingsError(f"cannot make the run's folder: {error}") from error


class Claim:
    """A run's folder belongs to one run at a time: as long as this is not closed, and the process lives.

    On a file system without locks it may belong to several, and `note` says so; else that is None.
    """

    def __init__(self, folder: Path, *, is_new: bool = False):
        """Raises SettingsError if another run has the folder, or nothing can be written there."""
        self.folder, self._is_new = folder, is_new
        self.note: str | None = None
        try:
            self._file = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise SettingsError(f"cannot write to {folder}: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            raise SettingsError(f"another run is writing to {folder}: wait for it, or name another --output") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(self._file)
                raise SettingsError(f"cannot lock {folder}: {error.strerror}") from error
            self.note = f"the file system of {folder} has no locks: see to it that no other run writes there"

    def close(self) -> None:
        """Let others have the folder. One that was new, and got nothing, is removed."""
        if self._is_new and _is_unused(self.folder):
            shutil.rmtree(self.folder)
        os.close(self._file)


def _is_unused(folder: Path) -> bool:
    return all(path.is_dir() or path.name == _LOCK for path in folder.rglob("*"))


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        key: value for name, below in tree.items() for key, value in _flat(below, f"{prefix}.{name}".strip(".")).items()
    }
