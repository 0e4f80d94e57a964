"""Prepared tensorflow-datasets sets as sources, and what is said of those that will not do."""

import io
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from convert.errors import SettingsError
from crossvit_jax.preprocess import UnreadableImage
from tests.train.data.tiny_set import prepare_tiny
from train.config import TrainConfig
from train.data.datasets import open_image_sets
from train.data.prepared.tfds import TfdsSource, open_tfds
from train.data.sources import DataError


def _png(value: int) -> io.BytesIO:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (value, value, value)).save(file, format="PNG")
    file.seek(0)
    return file


@pytest.fixture
def write_tfds(tmp_path):
    """Prepares a set named `tiny` from splits {name: number of examples} and returns its data folder."""

    def write(splits, *, features=None, example=None, file_format="array_record"):
        features = features or {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=["no", "yes", "perhaps"]),
        }
        example = example or (lambda i: {"id": str(i), "image": _png(i), "label": i % 3})

        prepare_tiny(tmp_path, features, example, splits, file_format)
        return str(tmp_path)

    return write


@pytest.mark.parametrize("held_out", ["validation", "test"])
def test_a_prepared_set_is_read_without_tensorflow(write_tfds, held_out):
    sets = open_tfds("tiny", write_tfds({"train": 9, held_out: 4}))
    assert (len(sets.train), len(sets.held_out), sets.held_out_split) == (9, 4, held_out)
    assert sets.class_names == ("no", "yes", "perhaps")
    source = pickle.loads(pickle.dumps(sets.train))  # as it reaches the workers
    for sample in (source[i] for i in range(9)):
        assert np.asarray(Image.open(io.BytesIO(sample["image"])))[0, 0, 0] % 3 == sample["label"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tinny", "unknown data set 'tinny'; did you mean 'tiny'"),
        ("cifar1O", "did you mean 'cifar10'"),
        ("photos/", "unknown data set 'photos/', and there is no such folder"),
        ("cifar10", "cifar10 is not prepared in .*prepared there: tiny.*array_record"),
        ("tiny:3.0.0", "not prepared in"),
        ("not a name!", "unknown data set"),
    ],
)
def test_a_set_that_is_not_there_is_a_clear_error(write_tfds, name, message):
    with pytest.raises(SettingsError, match=message) as error:
        open_tfds(name, write_tfds({"train": 2, "test": 2}))
    assert "\n" not in str(error.value)


def test_a_data_folder_that_is_not_there_is_a_clear_error(tmp_path):
    with pytest.raises(SettingsError, match=r"no folder .*nowhere"):
        open_tfds("cifar10", str(tmp_path / "nowhere"))


def test_a_standard_data_folder_in_nobodys_home_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", "~nobody-of-this-name")  # from the environment
    with pytest.raises(SettingsError, match="cifar10 is not prepared in ~nobody-of-this-name"):
        open_tfds("cifar10", None)


def test_without_a_home_folder_another_place_has_to_be_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda _: (_ for _ in ()).throw(KeyError("uid not found")))
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", "~/tensorflow_datasets")  # what it is then
    with pytest.raises(SettingsError, match=r"there is no home folder, .* name another with --data-dir"):
        open_image_sets(TrainConfig(dataset="cifar10"))
    assert not list(tmp_path.iterdir())


def test_a_set_without_held_out_split_is_a_clear_error(write_tfds):
    with pytest.raises(SettingsError, match=r"needs a split 'train' and one of .*; it has 'train'"):
        open_tfds("tiny", write_tfds({"train": 2}))


def test_a_split_without_labels_is_a_clear_error(write_tfds):
    data_dir = write_tfds({"train": 2, "test": 2}, example=lambda i: {"id": "", "image": _png(i), "label": -1})
    with pytest.raises(SettingsError, match="split 'train' of data set tiny has no labels"):
        open_tfds("tiny", data_dir)


def _forget_a_class(data_dir):
    """Leaves the classes `no` and `yes`, while the records also have the label 2."""
    (folder,) = Path(data_dir).glob("tiny/*")
    (folder / "label.labels.txt").write_text("no\nyes\n")
    features = (folder / "features.json").read_text()
    assert '"numClasses": "3"' in features
    (folder / "features.json").write_text(features.replace('"numClasses": "3"', '"numClasses": "2"'))


def test_a_label_out_of_range_is_found_before_training(write_tfds, monkeypatch):
    monkeypatch.setattr("train.data.prepared.tfds._LABELS_OF_LARGE_SPLIT", 3)  # a small one is looked at as a whole
    data_dir = write_tfds(
        {"train": 40, "test": 2}, example=lambda i: {"id": "", "image": _png(i), "label": 2 * (i == 30)}
    )
    _forget_a_class(data_dir)
    with pytest.raises(
        SettingsError, match=r"image \d+ of split 'train' of data set tiny has label 2: there are 2 classes"
    ):
        open_tfds("tiny", data_dir)


def test_of_a_large_split_some_labels_are_looked_at_and_the_others_when_they_are_read(write_tfds, monkeypatch):
    data_dir = write_tfds(
        {"train": 40, "test": 2}, example=lambda i: {"id": "", "image": _png(i), "label": 2 * (i == 30)}
    )
    _forget_a_class(data_dir)
    monkeypatch.setattr("train.data.prepared.tfds._SMALL_SPLIT", 0)
    with pytest.raises(SettingsError, match="has label 2"):
        open_tfds("tiny", data_dir)
    monkeypatch.setattr("train.data.prepared.tfds._LABELS_OF_LARGE_SPLIT", 3)
    asked, labels = [], TfdsSource.labels
    monkeypatch.setattr(TfdsSource, "labels", lambda self, indices: asked.append(indices) or labels(self, indices))
    source = open_tfds("tiny", data_dir).train
    assert asked == [[0, 19, 39], [0, 1]]
    wrong = []
    for index in range(40):
        try:
            source[index]
        except DataError as error:
            wrong.append((index, str(error)))
    ((index, message),) = wrong
    assert index not in (0, 19, 39)
    assert message.startswith(f"image {index} of split train in {data_dir}")
    assert message.endswith("has label 2: there are 2 classes")


def test_a_damaged_record_is_an_unreadable_image_and_a_set_that_is_gone_is_an_error(write_tfds):
    def noise(i):
        pixels = np.random.default_rng(i).integers(0, 256, (200, 200, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format="PNG")
        file.seek(0)
        return {"id": "", "image": file, "label": 0}

    data_dir = write_tfds({"train": 4, "test": 1}, example=noise)
    source = open_tfds("tiny", data_dir).train
    (records,) = Path(data_dir).glob("tiny/*/*train*")
    damaged = bytearray(records.read_bytes())
    place = bytes(damaged).index(source[2]["image"][1000:1020])
    damaged[place] ^= 1
    records.write_bytes(damaged)
    source = pickle.loads(pickle.dumps(source))  # as a worker opens it
    with pytest.raises(UnreadableImage, match=r"cannot read image 2 of split train: .*orrupt"):
        source[2]
    assert [source[i]["label"] for i in (0, 1, 3)] == [0, 0, 0]
    source = pickle.loads(pickle.dumps(source))
    shutil.rmtree(Path(data_dir) / "tiny")
    with pytest.raises(DataError, match=r"the data set is gone: there is no folder .*tiny"):
        source[0]


def test_a_prepared_set_whose_records_are_gone_is_a_clear_error(write_tfds):
    data_dir = write_tfds({"train": 2, "test": 2})
    next(Path(data_dir).glob("tiny/*/*test*")).unlink()
    with pytest.raises(SettingsError, match=r"split .test. of data set tiny cannot be read: .*No such file"):
        open_tfds("tiny", data_dir)


def test_the_fingerprint_of_a_prepared_set_tells_its_name_version_and_sizes(write_tfds):
    assert open_tfds("tiny", write_tfds({"train": 9, "test": 4})).fingerprint == "tiny/1.0.0 train=9 test=4"


def test_a_set_that_is_no_classification_is_a_clear_error(write_tfds):
    image = tfds.features.Image(shape=(None, None, 3), encoding_format="png")
    data_dir = write_tfds(
        {"train": 2, "test": 2},
        features={"left": image, "right": image},
        example=lambda i: {"left": _png(i), "right": _png(i)},
    )
    with pytest.raises(SettingsError, match=r"no image classification set.*left, right"):
        open_tfds("tiny", data_dir)


def test_a_set_without_random_access_is_a_clear_error(write_tfds):
    data_dir = write_tfds({"train": 2, "test": 2})
    info = next(Path(data_dir).glob("tiny/*/dataset_info.json"))
    info.write_text(info.read_text().replace("array_record", "tfrecord"))  # to write one takes TensorFlow
    with pytest.raises(SettingsError, match=r'stored as tfrecord.*file_format="array_record"'):
        open_tfds("tiny", data_dir)
