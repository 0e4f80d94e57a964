"""The data set that a run asks for: the digits, a folder, a list of files, or one prepared by other packages."""

from pathlib import Path

from convert.class_names import NATURAL, TEXT, in_order
from convert.errors import ConversionError, SettingsError
from convert.files import CSV_PREFIX, FOLDER_PREFIX, HF_PREFIX
from train.config import TrainConfig
from train.data.dense.open import open_dense_sets
from train.data.folders.classes import one_class_error, open_folder
from train.data.folders.listing import open_listing
from train.data.folders.pictures import has_classes, open_pictures
from train.data.prepared.digits import NAME, digits_in_memory
from train.data.prepared.huggingface import open_huggingface
from train.data.prepared.tfds import open_tfds
from train.data.sources import ImageSets


def open_image_sets(config: TrainConfig, *, class_names: tuple[str, ...] | None = None) -> ImageSets:
    """Open the data set that a run asks for, its classes in the order that it asks for.

    Args:
        class_names: in place of a file that tells the order: as a run has them that was begun with it.

    Raises SettingsError, saying what is wrong and what would work, if it is unknown, not prepared, cannot be read at
    random, has no images, a class without images in a folder, labels that are missing or stand for no class, or other
    classes than the file that tells their order.
    """
    if config.task in ("detection", "segmentation"):
        names = ("seed", "val_fraction", "exif", "ignore_index", "data_dir")
        return open_dense_sets(config.dataset, config.task, **{name: getattr(config, name) for name in names})
    sets = _open(config)
    if config.class_order is None:
        return sets
    is_file = config.class_order not in (NATURAL, TEXT)
    if is_file and class_names is not None and sorted(class_names) == sorted(sets.class_names):
        return sets.in_order(class_names)
    try:
        return sets.in_order(in_order(sets.class_names, config.class_order))
    except ConversionError as error:
        raise SettingsError(f"--class-order: {error}") from None


def check_trainable(config: TrainConfig, sets: ImageSets) -> None:
    """Raises SettingsError if there are no two classes to tell apart."""
    if len(sets.class_names) > 1:
        return
    (name,) = sets.class_names
    if config.dataset.startswith(FOLDER_PREFIX):
        raise one_class_error(Path(config.dataset.removeprefix(FOLDER_PREFIX)), name)
    raise SettingsError(f"data set {config.dataset} has one class, {name}: training needs two or more")


def _open(config: TrainConfig) -> ImageSets:
    if config.dataset.startswith(FOLDER_PREFIX):
        root = Path(config.dataset.removeprefix(FOLDER_PREFIX))
        if config.task == "pretraining" and not has_classes(root):
            return open_pictures(root, val_fraction=config.val_fraction, seed=config.seed)
        return open_folder(root, val_fraction=config.val_fraction, seed=config.seed)
    split = {"val_fraction": config.val_fraction, "seed": config.seed}
    if config.dataset.startswith(CSV_PREFIX):
        return open_listing(Path(config.dataset.removeprefix(CSV_PREFIX)), **split)
    if config.dataset.startswith(HF_PREFIX):
        return open_huggingface(config.dataset.removeprefix(HF_PREFIX), **split)
    if config.dataset == "digits":
        return open_digits(config.data_dir)
    return open_tfds(config.dataset, config.data_dir)


def open_digits(data_dir: str | None) -> ImageSets:
    """scikit-learn's digits, from memory; or the set that an earlier version prepared in `data_dir`, if one is there.

    The images are the same, byte for byte. Raises MissingExtra where scikit-learn is not installed.
    """
    versions = [] if data_dir is None else Path(data_dir, NAME).glob("*/dataset_info.json")
    if any(".incomplete" not in version.parent.name for version in versions):
        return open_tfds(NAME, data_dir)
    return digits_in_memory()
