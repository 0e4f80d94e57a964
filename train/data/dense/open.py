"""The data set with boxes or masks that a run asks for."""

from pathlib import Path

from convert.errors import SettingsError
from convert.files import CSV_PREFIX, FOLDER_PREFIX, HF_PREFIX, home_path
from crossvit_jax.preprocess import Exif
from train.data.dense.coco import open_coco
from train.data.dense.masks import open_masks
from train.data.dense.samples import DenseSets, Kind
from train.data.dense.scenes import open_scenes
from train.data.dense.voc import open_voc
from train.data.dense.yolo import open_yolo
from train.images.geometry import IGNORED

SCENES = "digits"  # the name of the scenes of digits: what `--dataset` is by itself
_BOXES = {"coco": open_coco, "voc": open_voc, "yolo": open_yolo}
_MASKS = "masks"
_ACCEPTED = {
    "detection": f"{SCENES}, coco:PATH, voc:PATH, yolo:data.yaml, or a prepared tensorflow-datasets set with boxes",
    "segmentation": f"{SCENES}, masks:PATH, or a prepared tensorflow-datasets set with masks",
}


def open_dense_sets(
    dataset: str,
    kind: Kind,
    *,
    seed: int,
    val_fraction: float,
    exif: Exif = "keep",
    ignore_index: int = IGNORED,
    data_dir: str | None = None,
) -> DenseSets:
    """Open a data set for detection or segmentation.

    Args:
        dataset: `digits` (scenes of them), `coco:PATH`, `voc:PATH`, `yolo:PATH` or the name of a prepared
            tensorflow-datasets set with boxes for detection; `digits`, `masks:PATH` or a set with masks for
            segmentation.
        seed: draws the scenes, and the pictures that are held out where the data set does not tell them.
        val_fraction: how many of all pictures are held out then.
        exif: what is done with EXIF orientations: boxes and masks belong to the pictures as the model sees them.
        ignore_index: the value in masks that counts nowhere, beside 255.
        data_dir: where tensorflow-datasets sets were prepared; none: its own folder.

    Raises SettingsError, naming file and value, for whatever is missing or does not fit together.
    """
    if dataset == SCENES:
        return open_scenes(kind, seed=seed)
    prefix, colon, path = dataset.partition(":")
    if colon and prefix in (*_BOXES, _MASKS):
        if not path:
            raise SettingsError(f"--dataset {dataset} needs a path behind the colon")
        if (prefix == _MASKS) != (kind == "segmentation"):
            has = "masks" if prefix == _MASKS else "boxes"
            raise SettingsError(f"--dataset {dataset} has {has}; for {kind}: {_ACCEPTED[kind]}")
        root = Path(home_path(path))
        if prefix == _MASKS:
            return open_masks(root, ignore_index=ignore_index, val_fraction=val_fraction, seed=seed, exif=exif)
        return _BOXES[prefix](root, val_fraction=val_fraction, seed=seed, exif=exif)
    if f"{prefix}{colon}" in (FOLDER_PREFIX, CSV_PREFIX, HF_PREFIX):
        raise SettingsError(f"--dataset {dataset} has neither boxes nor masks; for {kind}: {_ACCEPTED[kind]}")
    accepted = _ACCEPTED[kind]
    if Path(home_path(dataset)).exists():
        raise SettingsError(f"--dataset {dataset} is a path, and what is there is told before it: {accepted}")
    from train.data.dense.tfds import open_tfds_boxes, open_tfds_masks  # late: it takes seconds to import

    if kind == "detection":
        return open_tfds_boxes(dataset, data_dir, val_fraction=val_fraction, seed=seed, accepted=accepted)
    return open_tfds_masks(dataset, data_dir, accepted=accepted)
