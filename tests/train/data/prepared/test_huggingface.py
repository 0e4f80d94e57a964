"""Sets of Hugging Face `datasets` as sources, and what is said of those that will not do."""

import dataclasses
import io
import pickle
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from convert.errors import MissingExtra, SettingsError
from crossvit_jax.preprocess import UnreadableImage
from train.data.datasets import open_image_sets
from train.data.prepared.huggingface import open_huggingface, open_huggingface_split
from train.data.sources import DataError
from train.inference.dataset import open_data
from train.recipes import RECIPES

datasets = pytest.importorskip("datasets")
_NAMES = ["no", "yes", "perhaps"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def _png(value):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (value,) * 3).save(file, format="PNG")
    return file.getvalue()


def _table(count, *, label=None, images=None, start=0):
    rows = {
        "id": [str(place) for place in range(count)],
        "image": [{"bytes": _png(start + place), "path": None} for place in range(count)],
        "label": [place % 3 for place in range(count)],
    }
    features = {"id": datasets.Value("string"), "image": images or datasets.Image(), "label": label}
    features["label"] = label or datasets.ClassLabel(names=_NAMES)
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def _pixels(source):
    samples = [source[place] for place in range(len(source))]
    return [(int(np.asarray(Image.open(io.BytesIO(s["image"])))[0, 0, 0]), s["label"]) for s in samples]


def _open(path, **settings):
    return open_huggingface(str(path), **{"val_fraction": 0.25, "seed": 3} | settings)


def test_a_saved_set_with_splits(tmp_path):
    splits = {"test": _table(4), "validation": _table(3, start=100), "train": _table(6, start=200)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    sets = _open(tmp_path / "saved")
    assert (sets.class_names, sets.held_out_split, sets.sorted_by_name) == (tuple(_NAMES), "validation", False)
    assert _pixels(sets.train) == [(200 + place, place % 3) for place in range(6)]
    assert _pixels(sets.held_out) == [(100 + place, place) for place in range(3)]
    for split, start, count in (("val", 100, 3), ("test", 0, 4)):
        data = open_data({"dataset": f"hf:{tmp_path / 'saved'}"}, split, run=None)
        assert (data.class_names, data.split, data.sorted_by_name) == (tuple(_NAMES), split, False)
        assert _pixels(data.images) == [(start + place, place % 3) for place in range(count)]
    copy = pickle.loads(pickle.dumps(sets.train))
    assert (copy[4], len(pickle.dumps(sets.train)) < 10_000) == (sets.train[4], True)
    config = dataclasses.replace(RECIPES["finetune"], dataset=f"hf:{tmp_path / 'saved'}")
    assert open_image_sets(config).fingerprint == sets.fingerprint


def test_parquet_files_without_a_held_out_split_are_split_by_class(tmp_path):
    (tmp_path / "files").mkdir()
    _table(24).to_parquet(tmp_path / "files" / "train-00000.parquet")
    sets = _open(tmp_path / "files")
    assert (len(sets.train), len(sets.held_out), sets.held_out_split) == (18, 6, "25% of each class")
    assert [label for _, label in sorted(_pixels(sets.held_out), key=lambda pair: pair[1])] == [0, 0, 1, 1, 2, 2]
    assert sorted(_pixels(sets.train) + _pixels(sets.held_out)) == [(place, place % 3) for place in range(24)]
    assert _open(tmp_path / "files").fingerprint == sets.fingerprint != _open(tmp_path / "files", seed=4).fingerprint


def test_names_as_labels_and_files_beside_a_list(image_folder, tmp_path):
    """`load_dataset` of a folder of class folders gives paths in place of bytes."""
    for path in ("train/cat/1.png", "train/dog/2.png", "test/dog/3.png"):
        image_folder(path)
    sets = _open(image_folder())
    assert (sets.class_names, sets.held_out_split) == (("cat", "dog"), "test")
    assert [sets.train[place]["label"] for place in range(2)] == [0, 1]
    assert sets.train[0]["image"] == (tmp_path / "train/cat/1.png").read_bytes()
    (tmp_path / "train/cat/1.png").unlink()
    with pytest.raises(UnreadableImage, match="cannot read image 0 of split train: No such file"):
        sets.train[0]
    shutil.rmtree(datasets.config.HF_DATASETS_CACHE)
    with pytest.raises(DataError, match="the data set is gone: its files are missing"):
        sets.train[0]

    texts = _table(6).cast_column("label", datasets.Value("string"))
    datasets.DatasetDict(train=texts, test=texts).save_to_disk(tmp_path / "saved")
    sets = _open(tmp_path / "saved")
    assert (sets.class_names, sets.sorted_by_name) == (("0", "1", "2"), True)
    assert [label for _, label in _pixels(sets.train)] == [0, 1, 2, 0, 1, 2]


def test_a_row_without_a_picture_is_unreadable(tmp_path):
    table = _table(6).to_dict() | {"image": [None] + [{"bytes": _png(1), "path": None}] * 5}
    features = datasets.Features(
        id=datasets.Value("string"), image=datasets.Image(), label=datasets.ClassLabel(names=_NAMES)
    )
    table = datasets.Dataset.from_dict(table, features=features)
    datasets.DatasetDict(train=table, test=_table(3)).save_to_disk(tmp_path / "saved")
    sets = _open(tmp_path / "saved")
    with pytest.raises(UnreadableImage, match="cannot read image 0 of split train: it is empty"):
        sets.train[0]
    assert sets.train[1]["label"] == 1


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (lambda: {"test": _table(3)}, r"needs a split 'train'; it has 'test'"),
        (lambda: {"train": _table(1), "test": _table(3).remove_columns("label")}, "split 'test' .* has no columns"),
        (lambda: {"train": _table(4)}, "cannot be split: a class needs two images or more, unlike yes, perhaps"),
        (lambda: {"train": _table(3, label=datasets.Value("float32"))}, "is no image classification set: it needs one"),
        (lambda: {"train": _table(3), "test": _unlabelled()}, r"image 0 of split 'test' .* has label -1: there are 3"),
        (lambda: {"train": _named("a"), "test": _named("b")}, "held-out classes that are missing in training: b"),
        (lambda: {"train": _named("a"), "test": _named(None)}, "image 0 of split 'test' .* has no label"),
    ],
)
def test_a_set_that_will_not_do_is_told(tmp_path, splits, message):
    datasets.DatasetDict(splits()).save_to_disk(tmp_path / "saved")
    with pytest.raises(SettingsError, match=message):
        _open(tmp_path / "saved")
    with pytest.raises(SettingsError, match=r"saved has no split val; it has 't"):
        open_huggingface_split(str(tmp_path / "saved"), "val")


def _unlabelled():
    return _table(3).map(lambda _: {"label": -1})


def _named(name):
    table = _table(2).remove_columns("label")
    return table.add_column("label", [name] * 2, feature=datasets.Value("string"))


def test_names_that_lead_nowhere_are_told(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    for name in (str(tmp_path / "none"), "a:b:c", "a@b@c"):
        with pytest.raises(SettingsError, match=r"there is no such folder, and a data set of the hub is OWNER/NAME"):
            _open(name)
    with pytest.raises(SettingsError, match=r"^data set hf:.*empty cannot be opened: "):
        _open(tmp_path / "empty")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"needs datasets: pip install -e '\.\[hf\]'"):
        _open("owner/name")


def test_a_name_of_the_hub_may_have_a_configuration_and_a_revision(monkeypatch):
    asked = []

    def load(name, config=None, *, revision=None):
        asked.append((name, config, revision))
        return datasets.DatasetDict(train=_table(6), test=_table(3))

    monkeypatch.setattr(datasets, "load_dataset", load)
    for name in ("owner/name", "owner/name:small@v2", "name@main"):
        assert len(_open(name).held_out) == 3
    assert asked == [("owner/name", None, None), ("owner/name", "small", "v2"), ("name", None, "main")]


def test_an_image_without_a_label_is_told(tmp_path):
    """A ClassLabel that is missing is NaN among numbers, and would be an integer of no class."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    pixels = [Image.new("RGB", (4, 4), colour) for colour in ("red", "green", "blue", "white")]
    table = datasets.Dataset.from_dict({"image": pixels, "label": [0, None, 1, 0]}, features=features)
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "set")
    with pytest.raises(SettingsError, match=r"image 1 of split 'train' of data set hf:.* has no label"):
        _open(tmp_path / "set")
