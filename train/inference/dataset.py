"""The images that an evaluation is about: those that the run of the weights held out, or any others."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from convert.errors import SettingsError
from convert.files import CSV_PREFIX, FOLDER_PREFIX, HF_PREFIX
from convert.metadata import understand
from train.config import TrainConfig
from train.data.datasets import open_image_sets
from train.data.folders.classes import FolderSource, open_split
from train.data.folders.layout import find_splits
from train.data.folders.listing import open_listed_split, read_listing
from train.data.prepared.huggingface import open_huggingface_split
from train.data.sources import ImageSets, Source
from train.run.folder import read_run, read_settings
from train.tasks.begin import settings_of

_CHOICE = ("seed", "val_fraction")  # the settings that choose the held-out images


class _Files(NamedTuple):
    """A data set of image files: of a folder, or of a list."""

    path: Path
    is_list: bool

    @classmethod
    def of(cls, dataset: str) -> "_Files | None":
        """None for the data sets of packages, whose splits have names of their own."""
        for prefix in (FOLDER_PREFIX, CSV_PREFIX):
            if dataset.startswith(prefix):
                return cls(Path(dataset.removeprefix(prefix)), prefix == CSV_PREFIX)
        return None

    def splits(self) -> dict[str, str]:
        """What the splits are called in it, by train, val and test; none: it tells none."""
        if self.is_list:
            return {split: split for split in read_listing(self.path) if split is not None}
        return find_splits(self.path)[0] if self.path.is_dir() else {}

    def open(self, split: str) -> tuple[FolderSource, tuple[str, ...], list[str]]:
        """See `open_split`."""
        return (open_listed_split if self.is_list else open_split)(self.path, split)


class Data(NamedTuple):
    """What is evaluated."""

    dataset: str
    images: Source
    class_names: tuple[str, ...]  # in the order of the labels
    split: str  # which images they are, in words
    notes: list[str]
    sorted_by_name: bool  # see `train.data.sources.ImageSets`
    sets: ImageSets | None = None  # that they are a part of; none: they are those of a folder as it is


def open_data(given: dict[str, Any], split: str, run: str | None, task: str = "classification") -> Data:
    """The images asked for, with labels, boxes or masks as the task needs them.

    Args:
        given: those of dataset, data_dir, seed and val_fraction that were asked for. Of the others, `run` has the
            values where it was trained on the same data.
        split: held-out, train, val, test or all.
        run: the folder of the run that the weights come from; none: they come from elsewhere.

    Raises SettingsError if no data set is named and there is no run, the run held out other images than these settings
    would, or as `open_image_sets` does.
    """
    trained = None if run is None else read_settings(run)
    if trained is None and "dataset" not in given:
        raise SettingsError(
            "--dataset is needed: the weights do not come from the folder of a run, which tells its own"
        )
    if trained is not None and trained.task != task:
        raise SettingsError(f"the run in {run} learns {trained.task}, and the weights are for {task}")
    start = settings_of(task) if trained is None else _data_settings(trained)
    config = dataclasses.replace(start, **given)
    files = _Files.of(config.dataset)
    splits = {} if files is None else files.splits()
    if split in ("val", "test", "all") or (split == "train" and splits.keys() == {"train"}):
        if config.dataset.startswith(HF_PREFIX) and split != "all" and task == "classification":
            images, names, is_sorted = open_huggingface_split(config.dataset.removeprefix(HF_PREFIX), split)
            return Data(config.dataset, images, names, split, [], is_sorted)
        if files is None:
            raise SettingsError(f"--split {split} is not for {config.dataset}; choose held-out or train here")
        images, names, notes = files.open(split)
        if split == "all" and trained is not None and config.dataset == trained.dataset:
            notes = [*notes, f"the images that the run in {run} was trained on are among them"]
        return Data(config.dataset, images, names, splits.get(split, "all of them"), notes, True)
    if trained is None:
        sets, notes = open_image_sets(config), []
    else:
        sets, notes = _as_in_training(config, given, trained, run, bool(splits))
    if trained is None and files is not None and not splits:
        notes.append(
            f"{files.path} has no train/ and val/: the images held out by seed {config.seed} are taken, "
            f"{_share(config)}, which only a training with the same has not seen; --split all takes all"
        )
    told = f"training images; held out: {sets.held_out_split}" if split == "train" else sets.held_out_split
    images = sets.train if split == "train" else sets.held_out
    return Data(config.dataset, images, sets.class_names, told, [*sets.notes, *notes], sets.sorted_by_name, sets)


def _data_settings(trained: TrainConfig) -> TrainConfig:
    names = ("dataset", "data_dir", "seed", "val_fraction", "class_order", "exif", "ignore_index")
    return dataclasses.replace(settings_of(trained.task), **{name: getattr(trained, name) for name in names})


def _as_in_training(
    config: TrainConfig, given: dict[str, Any], trained: TrainConfig, run: str, has_splits: bool
) -> tuple[ImageSets, list[str]]:
    """The data set split as by the run, or another one; and what the user should know of that.

    Raises SettingsError if images that were trained on could be among those held out.
    """
    saved = read_run(run)
    _, names = understand(saved["model"]) if "model" in saved else (None, None)
    print_ = saved.get("data", {}).get("fingerprint")
    if config.dataset != trained.dataset:
        try:  # perhaps the same images in another place
            sets = open_image_sets(dataclasses.replace(config, class_order=trained.class_order), class_names=names)
        except SettingsError:
            sets = None
        if sets is None or sets.fingerprint != print_:
            config = dataclasses.replace(settings_of(config.task), **given)
            note = f"the run in {run} was trained on {trained.dataset}, and this is other data"
            if _Files.of(config.dataset) is not None and not has_splits:
                note += f", of which {_share(config)} are taken; --split all takes all"
            return open_image_sets(config), [note]
        return sets, [f"the images are those of the run in {run}"]
    sets = open_image_sets(config, class_names=names)
    if print_ is None:
        return sets, [f"the run in {run} does not tell its images: whether these were held out is not known"]
    if sets.fingerprint == print_:
        return sets, []
    asked = [f"{name} {getattr(config, name)}, not {getattr(trained, name)}" for name in _CHOICE]
    asked = [text for text, name in zip(asked, _CHOICE, strict=True) if getattr(config, name) != getattr(trained, name)]
    why = f"{' and '.join(asked)} was asked for" if asked else "images were added, removed or moved since then"
    instead = ""
    if _Files.of(config.dataset) is not None:
        instead = f"; --split {'val or test takes that folder' if has_splits else 'all takes all images'} as it is"
    raise SettingsError(
        f"{config.dataset} is not split as in the run in {run}: {why}, so that images which it was trained on would be "
        f"evaluated as held out{instead}"
    )


def _share(config: TrainConfig) -> str:
    return f"{config.val_fraction:.0%} of each class"
