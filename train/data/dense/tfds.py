"""Prepared tensorflow-datasets sets with boxes or masks. They are read without TensorFlow.

All records are looked at once before a run, their pictures not decoded: for the boxes, or the classes of the masks.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from convert.errors import SettingsError, one_line
from crossvit_jax.preprocess import UnreadableImage, open_image
from train.data.dense.boxes import Annotations, BoxFiles, box_sets
from train.data.dense.masks import UNKNOWN, read_mask
from train.data.dense.samples import DenseSets
from train.data.prepared.tfds import prepared_builder
from train.data.sources import HELD_OUT_SPLITS, TRAIN_SPLIT, DataError
from train.images.geometry import IGNORED

_CROWD = ("is_crowd", "is_difficult")
_MASK_WORDS = ("segment", "mask", "annotation")  # in the names of features that are masks without saying so


class TfdsRecords:
    """The records of a split, of which some features are read; images stay encoded."""

    def __init__(self, builder: Any, split: str, keys: tuple[str, ...]):
        import tensorflow_datasets as tfds

        self._records = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        self._features = tfds.features.FeaturesDict({key: builder.info.features[key] for key in keys})
        is_image = {key: isinstance(self._features[key], tfds.features.Image) for key in keys}
        self._decoders = {key: tfds.decode.SkipDecoding() for key in keys if is_image[key]}
        self.split, self._folder = split, builder.data_path

    def __len__(self) -> int:
        return len(self._records)

    def name(self, index: int) -> str:
        """Of an example, for messages."""
        return f"{index} of split {self.split}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises UnreadableImage for a damaged record, DataError if the data set is gone."""
        try:
            record = self._records[index]
        except (OSError, RuntimeError) as error:  # what array_record raises
            if not self._folder.exists():
                raise DataError(f"the data set is gone: there is no folder {self._folder} any more") from error
            raise UnreadableImage(self.name(index), one_line(error)) from error
        return self._features.deserialize_example_np(record, decoders=self._decoders)


# --- boxes ---


@dataclass(frozen=True, eq=False)
class TfdsBoxes(BoxFiles):
    """Pictures in records, whose `image_ids` are their places; see `train.data.dense.samples.DenseSource`."""

    records: TfdsRecords | None = None
    image: str = "image"  # the name of the feature

    def paths(self) -> list[str]:
        """Names, as there are no files."""
        return list(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises UnreadableImage for a damaged record, DataError if the data set is gone."""
        truth = self.truth(index)
        place = truth.pop("image_id")
        return {"image": self.records[place][self.image], **truth}

    def truth(self, index: int) -> dict[str, Any]:
        """See `DenseSource`."""
        return {**super().truth(index), "name": self.files[int(index)]}


class _RecordAnnotations(Annotations):
    """Those of records: there are no files to look for, and sizes are known."""

    def _check_files(self) -> None:
        pass

    def size_of(self, place: int, exif: str | None = None) -> None:
        return None


def open_tfds_boxes(name: str, data_dir: str | None, *, val_fraction: float, seed: int, accepted: str) -> DenseSets:
    """A set whose examples have an image and a sequence of objects, each with a box and a class.

    Objects marked `is_crowd` or `is_difficult` are crowds; boxes are shares of the picture, ymin, xmin, ymax, xmax.

    Args:
        accepted: see `train.data.prepared.tfds.prepared_builder`.

    Raises SettingsError if it is not prepared, has no such features, or boxes that do not fit.
    """
    builder = prepared_builder(name, data_dir, accepted=accepted)
    image, sequence, keys = _box_features(name, builder.info.features)
    held_out = _held_out_split(name, builder, needed=False)
    notes: list[str] = []
    sides = []
    for split in (TRAIN_SPLIT, held_out) if held_out else (TRAIN_SPLIT,):
        records = TfdsRecords(builder, split, (image, sequence))
        files, found = _scan_boxes(name, records, image, sequence, keys)
        sides.append(TfdsBoxes(**vars(files), records=records, image=image))
        notes += found
    label = builder.info.features[sequence].feature[keys["label"]]
    return box_sets(
        sides[0],
        sides[1] if len(sides) > 1 else None,
        list(label.names or map(str, range(label.num_classes))),
        origin=f"data set {name}",
        held_out_split=held_out,
        val_fraction=val_fraction,
        seed=seed,
        notes=notes,
    )


def _box_features(name: str, features: Any) -> tuple[str, str, dict[str, str]]:
    """The names of the image and of the objects, and those of what an object has: box, label, perhaps crowd, area."""
    import tensorflow_datasets as tfds

    images = [key for key, feature in features.items() if type(feature) is tfds.features.Image]
    image = "image" if "image" in images else images[0] if len(images) == 1 else None
    for sequence, feature in features.items():
        inside = getattr(feature, "feature", None)
        if image is None or not isinstance(inside, tfds.features.FeaturesDict):
            continue
        boxes = [key for key, part in inside.items() if isinstance(part, tfds.features.BBoxFeature)]
        labels = [key for key, part in inside.items() if type(part) is tfds.features.ClassLabel]
        label = next((key for key in ("label", "type") if key in labels), labels[0] if len(labels) == 1 else None)
        if len(boxes) == 1 and label is not None:
            keys = {"box": boxes[0], "label": label}
            crowd = next((key for key in _CROWD if key in inside), None)
            keys |= {"crowd": crowd} if crowd else {}
            return image, sequence, keys | ({"area": "area"} if "area" in inside else {})
    raise SettingsError(
        f"data set {name} has no boxes: it needs an image, and a sequence of objects with a box and a class; it has "
        f"{', '.join(sorted(features))}"
    )


def _scan_boxes(
    name: str, records: TfdsRecords, image: str, sequence: str, keys: dict[str, str]
) -> tuple[BoxFiles, list[str]]:
    annotations = _RecordAnnotations(f"data set {name}", "", "keep")
    for index in range(len(records)):
        try:
            example = records[index]
            with open_image(example[image]) as picture:
                width, height = picture.size
        except Exception:  # whatever Pillow's parsers raise; told when it is read
            annotations.add_picture(records.name(index), image_id=index, size=(1, 1))
            continue
        annotations.add_picture(records.name(index), image_id=index, size=(height, width))
        objects = example[sequence]
        boxes = np.asarray(objects[keys["box"]], np.float64).reshape(-1, 4)[:, [1, 0, 3, 2]]
        for place, box in enumerate(boxes * ((width, height) * 2)):
            area = objects[keys["area"]][place] if "area" in keys else None
            annotations.add_box(
                index,
                box,
                int(objects[keys["label"]][place]),
                crowd=bool(objects[keys["crowd"]][place]) if "crowd" in keys else False,
                area=area if area else None,
            )
    return annotations.source()


# --- masks ---


@dataclass(frozen=True, eq=False)
class TfdsMasks:
    """Pictures with masks in records; see `train.data.dense.samples.DenseSource`."""

    records: TfdsRecords
    image: str  # the names of the features
    mask: str
    classes: Int[np.ndarray, " values"]  # by the value of a pixel
    endless: bool = False

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises UnreadableImage for a damaged record or mask, DataError if the data set is gone."""
        example, name = self.records[index], self.records.name(index)
        return {"image": example[self.image], "name": name, "segments": self._segments(example, name)}

    def truth(self, index: int) -> dict[str, Any]:
        """See `DenseSource`."""
        name = self.records.name(index)
        return {"name": name, "image_id": int(index), "segments": self._segments(self.records[index], name)}

    def _segments(self, example: dict[str, Any], name: str) -> np.ndarray:
        return read_mask(example[self.mask], f"mask {name}", self.classes)


def open_tfds_masks(name: str, data_dir: str | None, *, accepted: str) -> DenseSets:
    """A set whose examples have an image and a mask of one channel.

    Classes are those that the mask names; where it names none, the values in the training masks. 255 counts nowhere.

    Args:
        accepted: see `train.data.prepared.tfds.prepared_builder`.

    Raises SettingsError if it is not prepared or has no such features.
    """
    builder = prepared_builder(name, data_dir, accepted=accepted)
    features = builder.info.features
    image, mask = _mask_features(name, features)
    held_out = _held_out_split(name, builder, needed=True)
    splits = [TfdsRecords(builder, split, (image, mask)) for split in (TRAIN_SPLIT, held_out)]
    count = getattr(features[mask], "num_classes", None)
    values = list(range(count)) if count else _scan_values(splits[0], mask)
    named = getattr(features[mask], "names", None) if count else None
    if len(values) < 2:
        raise SettingsError(f"the masks of data set {name} show one class, {values}: training needs two or more")
    table = np.full(256, UNKNOWN, np.uint8)
    table[255] = IGNORED
    table[values] = np.arange(len(values))
    train, held = (TfdsMasks(records, image, mask, table) for records in splits)
    about = f"{builder.info.full_name} {mask} {TRAIN_SPLIT}={len(train)} {held_out}={len(held)} {values}"
    return DenseSets(
        train,
        held,
        tuple(named or map(str, values)),
        held_out,
        hashlib.sha256(about.encode()).hexdigest(),
        kind="segmentation",
        category_ids=tuple(values),
    )


def _mask_features(name: str, features: Any) -> tuple[str, str]:
    import tensorflow_datasets as tfds

    images = {key: feature for key, feature in features.items() if isinstance(feature, tfds.features.Image)}
    grey = [key for key, feature in images.items() if feature.shape[-1] == 1]
    labelled = [key for key in grey if isinstance(images[key], tfds.features.LabeledImage)]
    likely = [key for key in images if any(word in key for word in _MASK_WORDS)]
    for masks in (labelled, [key for key in grey if key in likely], likely):
        others = [key for key in images if key not in masks and key not in grey]
        if len(masks) == 1 and others:
            return "image" if "image" in others else others[0], masks[0]
    raise SettingsError(
        f"data set {name} has no masks: it needs an image, and a mask of one channel; it has "
        f"{', '.join(sorted(features))}"
    )


def _scan_values(records: TfdsRecords, mask: str) -> list[int]:
    """All values in the masks but 255."""
    seen: set[int] = set()
    anything = np.arange(256).astype(np.uint8)
    anything[UNKNOWN] = IGNORED  # no mask has so many classes
    for index in range(len(records)):
        try:
            seen.update(np.unique(read_mask(records[index][mask], "", anything)).tolist())
        except UnreadableImage:
            continue  # told when it is read
    return sorted(seen - {IGNORED})


def _held_out_split(name: str, builder: Any, *, needed: bool) -> str | None:
    splits = {split for split, info in builder.info.splits.items() if info.num_examples}
    held_out = next((split for split in HELD_OUT_SPLITS if split in splits), None)
    if TRAIN_SPLIT not in splits or (needed and held_out is None):
        wanted = f"{TRAIN_SPLIT!r} and one of {', '.join(map(repr, HELD_OUT_SPLITS))}"
        raise SettingsError(f"data set {name} needs a split {wanted}; it has {', '.join(map(repr, sorted(splits)))}")
    return held_out
