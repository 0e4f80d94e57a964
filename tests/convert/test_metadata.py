"""What files say about themselves: written in the newest format, read in all of them."""

import contextlib
import dataclasses
import json
import time
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


_VARIANT = get_config("15-dagger-408", drop_path_rate=0.1, num_classes=2)


@pytest.mark.parametrize("config", [THREE, _VARIANT], ids=["three", "variant"])
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
    config = get_config("9", image_size=48, image_scale=(1, 2 / 3), drop_rate=0.5)
    fields = [field.name for field in dataclasses.fields(config) if field.name not in ("branches", "fusion_depth")]
    settings = {name: getattr(config, name) for name in fields}
    settings |= {"embed_dim": [128, 256], "depth": [1, 3], "num_heads": [4, 4], "mlp_ratio": [3.0, 3.0]}
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


_MILLION = 1_000_000_000
_DAMAGED = {
    "format": ("2", True, 0, None, [], 10**30),
    "class_names": ("ab", ["a"], ["a", 1], ["a", "b", "c"], {"a": 0, "b": 1}, [["a"], "b"], 2, ""),
    "exif": ("turn", 3, ["keep"]),
    "mean": (None, [0.5] * 3, "x"),
    "config.name": ("", None, 7, "x" * 65, "a\nb", ["custom"]),
    "config.stages": (_MILLION, 0, "2", 2.0, True, [], 1023),
    "config.image_size": (0, "48", [48], [48, 96, 1], [48.0, 96], [[48], 96], 10**30, None, {}),
    "config.num_classes": (-1, 2.0, "2", None, 10**12, True),
    "config.in_chans": (0, "3", 1.5, _MILLION),
    "config.crop_pct": (0, -1, 1.01, float("nan"), float("inf"), "0.9", None, True),
    "config.drop_rate": (1, -0.1, float("nan"), "0", None, [0.1]),
    "config.fusion_depth": (_MILLION, [0], "0", [0, None], 1.5, -1),
    "config.multi_conv": ("no", 0, None, []),
    "config.global_pool": (None, "max", ["token"]),
    "config.branches": ([], None, 3, "ab", {}, [[]], [{}], ["embed_dim"]),
    "config.branches.0.embed_dim": (0, 13, "12", 12.0, None, 2**40, True, []),
    "config.branches.0.num_heads": (0, 5, "2", None, 2.0),
    "config.branches.0.depth": (0, [], [1], [1, "2"], [1, [2]], None, _MILLION, "1"),
    "config.branches.0.head_dim": (0, 5, "6", 2.0),
    "config.branches.0.attention": ("linear", "spatial-reduction:1", "spatial-reduction:3", 1, None, ["full"]),
    "config.branches.0.mlp_ratio": (0, float("nan"), float("inf"), "2", None, [2], 10**9),
    "config.branches.0.patch_size": (0, 7, "12", None, 12.5),
    "config.branches.0.image_scale": ("1e99999999", "1/0", "a", float("nan"), 0, None, "9" * 5000, [1], "-1"),
}


@pytest.mark.parametrize("place", _DAMAGED)
def test_what_it_says_is_not_believed(place):
    for value in _DAMAGED[place]:
        description = through_json(THREE, ("a", "b"))
        *parents, key = place.split(".")
        inner = description
        for parent in parents:
            inner = inner[int(parent) if parent.isdigit() else parent]
        inner[key] = value
        begin = time.perf_counter()
        with pytest.raises(ConversionError, match=r"metadata|its |newer"):
            understand(description)
        del inner[key]
        with contextlib.suppress(ConversionError):  # many have a default
            understand(description)
        assert time.perf_counter() - begin < 1


def test_a_name_that_is_known_has_the_shape_and_the_heads_of_that_variant():
    config = get_config("ti", num_heads=(6, 6))
    assert understand(through_json(config))[0] == config.replace(name="custom")  # written as what it is
    description = through_json(get_config("ti"))
    description["config"]["branches"][0]["num_heads"] = 6
    with pytest.raises(ConversionError, match=r"names the variant ti with num_heads \(6, 3\), not \(3, 3\)"):
        understand(description)


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[]", "7", "null", '"x"', "{}", '{"format": ' + "9" * 5000 + "}"])
def test_text_that_is_no_description_is_one_line(text):
    with pytest.raises(ConversionError, match="is damaged"):
        understand(text)
