"""Data sets as sources: the digits, tensorflow-datasets sets, folders; and what is said of those that will not do."""

import dataclasses
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

from train.config import RECIPES, SettingsError
from train.digits import held_out_indices
from train.sources import open_digits, open_folder, open_image_sets, open_tfds


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

        class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
            VERSION = tfds.core.Version("1.0.0")
            name = "tiny"
            pkg_dir_path = None

            def _info(self):
                return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

            def _split_generators(self, dl_manager):
                return {split: self._generate_examples(count) for split, count in splits.items()}

            def _generate_examples(self, count):
                for i in range(count):
                    yield i, example(i)

        tfds.disable_progress_bar()
        offline = tfds.download.DownloadConfig(try_download_gcs=False)
        Tiny(data_dir=tmp_path, file_format=file_format).download_and_prepare(download_config=offline)
        return str(tmp_path)

    return write


# --- the digits ---


def test_the_digits_are_all_of_scikit_learns(digits_dir):
    sets = open_digits(digits_dir)
    assert sets.class_names == tuple("0123456789")
    digits = load_digits()
    held_out = held_out_indices(digits.target)
    expected = {"train": np.delete(np.arange(1797), held_out), "test": held_out}
    for source, indices in ((sets.train, expected["train"]), (sets.held_out, expected["test"])):
        samples = [source[i] for i in range(len(source))]
        pixels = [np.asarray(Image.open(io.BytesIO(sample["image"])))[..., 0] for sample in samples]
        # tfds shuffles once when it writes, so compare as sets of (pixels, label)
        ours = {(p.tobytes(), sample["label"]) for p, sample in zip(pixels, samples, strict=True)}
        images = np.round(digits.images[indices] * 255 / 16).astype(np.uint8)
        assert ours == {(p.tobytes(), int(t)) for p, t in zip(images, digits.target[indices], strict=True)}
        assert len(samples) == len(indices)


def test_the_held_out_digits_are_a_fifth_of_each_class():
    labels = load_digits().target
    held_out = held_out_indices(labels)
    np.testing.assert_array_equal(held_out, held_out_indices(labels))
    counts, total = np.bincount(labels[held_out]), np.bincount(labels)
    assert np.all(np.abs(counts - total / 5) <= 0.5)


def test_the_digits_are_prepared_once(digits_dir, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("prepared again")

    monkeypatch.setattr(tfds.core.GeneratorBasedBuilder, "download_and_prepare", refuse)
    open_digits(digits_dir)


def test_digits_that_cannot_be_written_are_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match=r"cannot prepare the digits.*--data-dir"):
        open_digits(str(tmp_path / "file" / "below"))


# --- tensorflow-datasets ---


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


def test_a_set_without_held_out_split_is_a_clear_error(write_tfds):
    with pytest.raises(SettingsError, match=r"needs a split 'train' and one of .*; it has 'train'"):
        open_tfds("tiny", write_tfds({"train": 2}))


def test_a_split_without_labels_is_a_clear_error(write_tfds):
    data_dir = write_tfds({"train": 2, "test": 2}, example=lambda i: {"id": "", "image": _png(i), "label": -1})
    with pytest.raises(SettingsError, match="split 'train' of data set tiny has no labels"):
        open_tfds("tiny", data_dir)


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


# --- folders ---


def _labels_by_file(source):
    return {source[i]["name"].split("/")[-1]: source[i]["label"] for i in range(len(source))}


@pytest.mark.parametrize("held_out", ["val", "validation", "test"])
def test_a_folder_with_two_sides(image_folder, held_out):
    for path in ("train/cat/1.png", "train/cat/deep/2.JPG", "train/dog/3.png", f"{held_out}/cat/4.png"):
        image_folder(path)
    image_folder(f"{held_out}/dog/5.jpeg")
    (image_folder() / "train" / "dog" / "notes.txt").write_text("no image")
    sets = open_folder(image_folder(), val_fraction=0.1, seed=0)
    assert sets.class_names == ("cat", "dog")
    assert _labels_by_file(sets.train) == {"1.png": 0, "2.JPG": 0, "3.png": 1}
    assert _labels_by_file(sets.held_out) == {"4.png": 0, "5.jpeg": 1}
    assert pickle.loads(pickle.dumps(sets.train))[0] == sets.train[0]


def test_one_folder_is_split_by_class_and_seed(image_folder):
    for i in range(30):
        image_folder(f"cat/{i}.png")
    for i in range(30, 35):
        image_folder(f"dog/{i}.png")

    def held_out(seed):
        sets = open_folder(image_folder(), val_fraction=0.2, seed=seed)
        train, val = _labels_by_file(sets.train), _labels_by_file(sets.held_out)
        assert not set(train) & set(val)
        assert len(train) + len(val) == 35
        assert sorted(val.values()) == [0] * 6 + [1]
        return set(val)

    assert held_out(0) == held_out(0)
    assert held_out(0) != held_out(1)


def test_the_split_of_a_folder_follows_the_settings(image_folder):
    for i in range(8):
        image_folder(f"only/{i}.png")
    config = dataclasses.replace(RECIPES["imagenet"], dataset=f"folder:{image_folder()}", val_fraction=0.5)
    assert len(open_image_sets(config).held_out) == 4


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no class folders"),
        (["train/cat/1.png"], "none of validation/, val/, test/"),
        (["train/cat/1.png", "val/dog/1.png"], "classes in val/ that are missing in train/: dog"),
        (["train/cat/1.png", "train/dog/1.png", "val/dog/1.png"], "classes in train/ that are missing in val/: cat"),
        (["cat/1.png", "dog/1.png", "dog/2.png"], "two images or more, unlike cat"),
    ],
)
def test_a_folder_that_will_not_do_is_a_clear_error(image_folder, files, message):
    for file in files:
        image_folder(file)
    with pytest.raises(SettingsError, match=message):
        open_folder(image_folder(), val_fraction=0.1, seed=0)


def test_a_class_without_images_is_a_clear_error(image_folder):
    image_folder("cat/1.png")
    (image_folder() / "dog").mkdir()
    with pytest.raises(SettingsError, match=r"no images in .*dog"):
        open_folder(image_folder(), val_fraction=0.1, seed=0)


def test_a_folder_that_is_not_there_is_a_clear_error(tmp_path):
    with pytest.raises(SettingsError, match="no folder"):
        open_folder(tmp_path / "nowhere", val_fraction=0.1, seed=0)
