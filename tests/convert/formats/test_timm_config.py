"""What timm's `config.json` beside weights says is honoured, or refused where it cannot be."""

import json
import shutil
from pathlib import Path

import pytest
from timm.models import save_for_hf

from convert import ConversionError, load_weights
from convert.metadata import summary
from tests.convert.conftest import TIMM_SETTINGS

NAMES = [f"class {i}" for i in range(TIMM_SETTINGS["num_classes"])]


@pytest.fixture(scope="module")
def _saved(timm_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository")
    save_for_hf(timm_model, folder, safe_serialization="both")
    return folder


@pytest.fixture
def repository(_saved, tmp_path):
    """A function that makes a folder as timm writes it to the hub, with changes: of the settings for images, or others.

    Returns the path of the weights.
    """

    def make(file="model.safetensors", *, images=(), **others):
        said = json.loads((_saved / "config.json").read_text())
        said["pretrained_cfg"] |= dict(images)
        (tmp_path / "config.json").write_text(json.dumps(said | others))
        return Path(shutil.copy(_saved / file, tmp_path))

    return make


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_what_timm_writes_beside_a_usual_model_changes_nothing(repository, file):
    weights = load_weights(repository(file))
    assert weights.notes == () and weights.class_names is None
    assert weights.config.image_size == (48, 48) and weights.config.crop_pct == 0.875


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ({"mean": [0.5, 0.5, 0.5]}, r"mean \(0.5, 0.5, 0.5\), not \(0.485, 0.456, 0.406\)"),
        ({"std": [0.5, 0.5, 0.5]}, r"std \(0.5, 0.5, 0.5\), not \(0.229, 0.224, 0.225\)"),
        ({"interpolation": "bilinear"}, "interpolation bilinear, not bicubic"),
        (
            {"crop_mode": "squash", "interpolation": "random"},
            "interpolation random, not bicubic; crop_mode squash, not",
        ),
        ({"crop_pct": "large"}, "crop_pct of 'large': it must be a number above 0"),
        ({"crop_pct": 0}, "crop_pct of 0"),
    ],
)
def test_images_that_are_prepared_otherwise_are_refused_with_both_values(repository, images, message):
    path = repository(images=images)
    with pytest.raises(ConversionError, match=message) as caught:
        load_weights(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_settings_for_images_without_an_architecture_count_too(repository):
    path = repository(images={"std": [1, 1, 1]}, architecture=None)
    with pytest.raises(ConversionError, match=r"std \(1, 1, 1\), not"):
        load_weights(path)


def test_what_transformers_writes_beside_weights_counts_too(repository, tmp_path):
    """Names by index in its config.json, and the settings of its image processor in a file of their own."""
    path = repository()
    about = {"model_type": "crossvit", "id2label": {str(index): name for index, name in enumerate(NAMES)}}
    (tmp_path / "config.json").write_text(json.dumps(about))
    assert load_weights(path).class_names == tuple(NAMES)
    about["id2label"] = {str(index): f"LABEL_{index}" for index in range(len(NAMES))}  # nobody has named them
    (tmp_path / "config.json").write_text(json.dumps(about))
    assert load_weights(path).class_names is None
    processor = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 3}
    for change, message in (
        ({}, None),
        (
            {"image_mean": [0.5, 0.5, 0.5]},
            r"the preprocessor_config\.json beside it asks for mean \(0.5, 0.5, 0.5\), not",
        ),
        ({"resample": 2}, "interpolation bilinear, not bicubic"),
        ({"do_normalize": False}, r"mean \(0, 0, 0\), not .*; std \(1, 1, 1\), not"),
    ):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor | change))
        if message is None:
            assert load_weights(path).notes == ()
        else:
            with pytest.raises(ConversionError, match=message):
                load_weights(path)


def test_another_architecture_is_refused(repository):
    with pytest.raises(ConversionError, match="architecture crossvit_small_240, not ti"):
        load_weights(repository(architecture="crossvit_small_240"))


def test_crop_and_pooling_are_taken_over_up_to_exported_files(repository):
    weights = load_weights(repository(images={"crop_pct": 0.95}, model_args={"global_pool": "avg"}))
    assert weights.config.crop_pct == 0.95 and weights.config.global_pool == "avg"
    assert "crop_pct 0.95, as the config.json beside it says" in weights.notes
    assert summary(weights)["crop_pct"] == 0.95
    assert load_weights(repository(images={"crop_pct": 0.95}), crop_pct=0.5).config.crop_pct == 0.5


def test_names_of_classes_are_taken_over(repository):
    assert load_weights(repository(label_names=NAMES)).class_names == tuple(NAMES)
    by_index = {str(index): name for index, name in enumerate(NAMES)}
    assert load_weights(repository(label_names=by_index)).class_names == tuple(NAMES)
    weights = load_weights(repository(label_names=NAMES[:3]))
    assert weights.class_names is None
    assert weights.notes == ("the label_names in the config.json beside it are not taken: they are not 10",)


def test_an_older_file_with_all_settings_in_one_dict_is_read(repository):
    path = repository()
    told = {"architecture": "crossvit_tiny_240", "num_classes": 10, "labels": NAMES, "mean": [0.485, 0.456, 0.406]}
    file = path.with_name("config.json")
    file.write_text(json.dumps(told))
    assert load_weights(path).class_names == tuple(NAMES)
    file.write_text(json.dumps(told | {"mean": [0, 0, 0]}))
    with pytest.raises(ConversionError, match=r"mean \(0, 0, 0\)"):
        load_weights(path)


def test_a_file_of_somebody_else_is_left_alone_and_a_damaged_one_told(repository):
    path = repository(images={"mean": [0, 0, 0]}, architecture="vit_base_patch16_224")
    other = path.rename(path.with_name("other.safetensors"))
    assert load_weights(other).notes == ()
    file = path.with_name("config.json")
    file.write_text("{")
    assert load_weights(other).notes == ()
    with pytest.raises(ConversionError, match=r"config\.json cannot be read"):
        load_weights(other.rename(path))
    file.write_text('{"train": {}, "architecture": 3}')
    assert load_weights(path).notes == ()


def test_an_image_size_other_than_the_weights_is_told(repository):
    weights = load_weights(repository(images={"input_size": [3, 240, 240]}))
    assert weights.config.image_size == (48, 48)
    (note,) = weights.notes
    assert "is for images (3, 240, 240); the weights' own size is taken" in note
