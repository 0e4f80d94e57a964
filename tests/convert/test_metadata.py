"""What files say about themselves: written in the newest format, read in all of them."""

import dataclasses
import json
from fractions import Fraction

import pytest

from convert.errors import ConversionError
from convert.metadata import describe, recorded_exif, understand
from crossvit_jax.config import Branch, CrossViTConfig, get_config

THREE = CrossViTConfig(
    name="custom",
    branches=(
        Branch(embed_dim=12, depth=(1, 2), num_heads=2, mlp_ratio=2.0, patch_size=12),
        Branch(embed_dim=24, depth=1, num_heads=3, patch_size=16, image_scale=2 / 3),
        Branch(embed_dim=20, depth=1, num_heads=4, mlp_ratio=1.5, patch_size=8, image_scale=1 / 2),
    ),
    fusion_depth=(0, 2),
    image_size=(48, 96),
    num_classes=2,
)


def through_json(config, class_names=None):
    return json.loads(json.dumps(describe(config, class_names)))


@pytest.mark.parametrize("config", [THREE, get_config("15-dagger-408", drop_path_rate=0.1)], ids=["three", "variant"])
def test_settings_and_names_come_back(config):
    assert understand(through_json(config, ("a", "b"))) == (config, ("a", "b"))
    assert understand(json.dumps(describe(config, None))) == (config, None)


def test_a_description_tells_the_task_and_what_images_are_normalised_with():
    description = through_json(THREE)
    assert description["format"] == 2
    assert description["task"] == "classification"
    assert (description["mean"], description["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert [branch["image_scale"] for branch in description["config"]["branches"]] == ["1", "2/3", "1/2"]


@pytest.mark.parametrize("exif", [None, "keep", "apply"])
def test_what_training_did_with_orientations_comes_back(exif):
    description = json.loads(json.dumps(describe(THREE, None, exif)))
    assert description.get("exif", "not written") == (exif or "not written")
    assert understand(description) == (THREE, None)
    assert recorded_exif(description) == recorded_exif(json.dumps(description)) == exif


def test_the_first_format_is_read():
    config = get_config("9", image_size=48, image_scale=(1, 2 / 3), stages=2, depth=(1, 2), drop_rate=0.5)
    fields = [field.name for field in dataclasses.fields(config) if field.name not in ("branches", "fusion_depth")]
    settings = {name: getattr(config, name) for name in fields}
    settings |= {"embed_dim": [128, 256], "depth": [1, 2], "num_heads": [4, 4], "mlp_ratio": [3.0, 3.0]}
    settings |= {"patch_size": [12, 16], "image_scale": ["1", str(Fraction(2, 3))], "image_size": [48, 48]}
    old = {"format": 1, "config": settings, "class_names": None}
    assert understand(json.loads(json.dumps(old))) == (config, None)
    with pytest.raises(ConversionError, match=r"unknown keys: task$"):
        understand(old | {"task": "classification"})


@pytest.mark.parametrize("place", [(), ("config",), ("config", "branches", 1)], ids=str)
def test_keys_that_are_not_known_are_named(place):
    description = through_json(THREE)
    inner = description
    for key in place:
        inner = inner[key]
    inner |= {"window": 7, "anchors": 3}
    with pytest.raises(ConversionError, match=r"its 'crossvit' metadata has unknown keys: anchors, window$"):
        understand(description)


@pytest.mark.parametrize(("key", "value"), [("task", "captions"), ("mean", [0.5, 0.5, 0.5]), ("exif", ["flip"])])
def test_what_this_version_cannot_do_is_refused(key, value):
    with pytest.raises(ConversionError, match=f"its {key} is .*; this version knows only"):
        understand(through_json(THREE) | {key: value})
