"""Detectors and segmenters as weights: around any source, and whole from file to file, bit for bit."""

import jax
import numpy as np
import pytest
import torch
from flax import nnx

import convert
from convert import ConversionError, load_flax, load_torch, load_weights, save, to_flax, to_torch
from convert.architecture import expected_shapes, infer_config
from convert.metadata import describe, understand
from convert.tree import shapes_of
from crossvit_jax import CrossViTDetector, CrossViTSegmenter
from crossvit_jax.config import CUSTOM, get_dense_config
from crossvit_torch import CrossViTDetector as TorchDetector
from crossvit_torch import CrossViTSegmenter as TorchSegmenter
from crossvit_torch import create_model, detection, segmentation
from tests.convert.conftest import perturb, refused, run

_SIZES = {"image_size": 48, "image_scale": (1, 2 / 3)}
_SMALL = _SIZES | {"stages": 1, "depth": (1, 1)}  # which is told by metadata only
_MODELS = {
    "detector": (detection.create_detector, {"strides": (6, 12, 24), "distances": (24, 48), "num_convs": 1}),
    "upernet": (segmentation.create_segmenter, {"strides": (12, 24), "scse": True}),
    "mask": (segmentation.create_segmenter, {"decoder": "mask", "num_blocks": 1}),
}


_TOLD = {
    "detector": "detection, on levels of 6, 12, 24",
    "upernet": "segmentation by upernet with scse, on levels of 12, 24",
    "mask": "segmentation by mask, on a level of 12",
}


@pytest.fixture(scope="module", params=_MODELS)
def model(request) -> torch.nn.Module:
    create, settings = _MODELS[request.param]
    return perturb(create("ti", num_classes=3, width=64, **_SIZES, **settings))


def assert_same(tensors, state):
    assert tensors.keys() == state.keys()
    for name, want in state.items():
        assert np.array_equal(tensors[name], want.numpy()), name


def test_every_name_and_shape_is_the_twins_and_tells_the_settings(model):
    shapes = shapes_of(model.state_dict())
    assert expected_shapes(model.config) == shapes
    told = infer_config(shapes)
    usual = {"distances": None} if model.config.task == "detection" else {}  # which no shape tells
    assert told == model.config.replace(**usual), (told, model.config)


def test_settings_come_back_from_the_metadata(model):
    assert understand(describe(model.config, ("a", "b", "c"))) == (model.config, ("a", "b", "c"))


def test_a_model_comes_back_whole_from_torch_to_flax_to_torch_in_every_format(model, tmp_path):
    state, names = model.state_dict(), ("cat", "dog", "owl")
    first = tmp_path / "first.pth"
    torch.save({"model": {f"module.{name}": tensor for name, tensor in state.items()}}, first)
    flax = load_flax(first)
    for ending in (".safetensors", ".flax.safetensors", ".pth", ""):
        second = save(flax, model.config, tmp_path / f"second{ending}", class_names=names)
        weights = load_weights(second)
        assert_same(weights.tensors, state)
        if ending != ".pth":  # which has no place for them
            assert (weights.config, weights.class_names) == (model.config, names)
    back = load_torch(second)
    assert isinstance(back, TorchDetector | TorchSegmenter) and type(back) is type(model)
    assert_same({name: tensor.numpy() for name, tensor in back.state_dict().items()}, state)


def test_trees_and_state_dicts_are_inverse(model):
    assert_same({name: x.numpy() for name, x in to_torch(to_flax(model.state_dict())).items()}, model.state_dict())


@pytest.mark.parametrize("kind", _MODELS)
def test_the_command_converts_verifies_and_tells_what_it_is(kind, tmp_path, capsys):
    create, settings = _MODELS[kind]
    # eight classes: Segmenter's last norm is over them, and of few it makes much of float32's rounding
    torch.manual_seed(0)
    model = perturb(create("ti", num_classes=8, width=64, **_SMALL, **settings))
    source = save(model.state_dict(), model.config, tmp_path / "a.safetensors")
    status, out, _ = run(capsys, source, tmp_path / "b.flax.safetensors", "--verify")
    assert status == 0 and "every tensor comes back bit for bit" in out
    status, out, _ = run(capsys, tmp_path / "b.flax.safetensors", "--info")
    assert status == 0 and f"task        {_TOLD[kind]} pixels with 64 channels" in out
    assert "timm has no model for" in refused(capsys, source, tmp_path / "c.hf")
    with pytest.raises(ConversionError, match="predict is for classifiers"):
        convert.predict(source, np.zeros((48, 48, 3), np.uint8))


@pytest.mark.parametrize(
    ("task", "kind", "twin"),
    [("detection", CrossViTDetector, TorchDetector), ("segmentation", CrossViTSegmenter, TorchSegmenter)],
)
def test_a_model_is_built_around_a_classifier(small, task, kind, twin, caplog):
    settings = {"num_classes": 4, "width": 64, "strides": (12, 24)}
    source = load_weights(small)
    flax = load_flax(small, task=task, seed=3, **settings)
    head = "head" if task == "detection" else "decoder"
    assert "head for 5 classes dropped" in caplog.text
    assert f"new for {task}, and untrained: backbone.pyramid, {head}" in caplog.text
    assert type(flax) is kind and flax.class_names is None
    state = {name: x.numpy() for name, x in to_torch(flax).items()}
    of_body = {name: array for name, array in source.tensors.items() if not name.startswith("head.")}
    assert all(np.array_equal(state[f"backbone.body.{name}"], array) for name, array in of_body.items())
    other = load_torch(small, task=task, seed=3, **settings)
    assert type(other) is twin
    assert_same(state, other.state_dict())
    again = load_weights(small, task=task, seed=4, **settings).tensors
    assert not np.array_equal(again["backbone.pyramid.fuse.weight"], state["backbone.pyramid.fuse.weight"])


def test_what_is_new_starts_as_in_a_fresh_model(small):
    settings = {"num_classes": 4, "width": 64, "strides": (12,)}
    tensors = load_weights(small, task="detection", **settings).tensors
    fresh = detection.CrossViTDetector(load_weights(small, task="detection", **settings).config).state_dict()
    for name, want in fresh.items():
        if not name.startswith("backbone.body."):
            assert abs(tensors[name].mean() - want.mean().item()) < 0.03, name
            assert abs(tensors[name].std() - want.std(correction=0).item()) < 0.03, name


def test_a_detector_takes_other_sizes_and_classes(tmp_path, caplog):
    create, settings = _MODELS["detector"]
    model = perturb(create("ti", num_classes=3, width=64, **_SMALL, **settings))
    path = save(model.state_dict(), model.config, tmp_path / "a.safetensors", class_names=("a", "b", "c"))
    other = load_flax(path, num_classes=7, image_size=(48, 96), distances=(30, 60))
    changes = {"name": CUSTOM, "num_classes": 7, "image_size": (48, 96), "distances": (30, 60)}  # it has one stage
    assert other.config == model.config.replace(**changes)
    assert "position embeddings resampled" in caplog.text
    assert (
        "new for 7 classes instead of 3, and untrained: head.classification_head.cls_logits.bias, head" in caplog.text
    )
    state = to_torch(other)
    same = [name for name in model.state_dict() if "pos_embed" not in name and "cls_logits" not in name]
    assert all(torch.equal(state[name], model.state_dict()[name]) for name in same)
    segmenter = load_flax(path, task="segmentation", num_classes=2, width=64, strides=(12, 24))
    assert "dropped of the detection weights: backbone.pyramid, head" in caplog.text
    assert type(segmenter) is CrossViTSegmenter
    classifier = load_torch(path, task="classification", num_classes=2)
    assert classifier(torch.zeros(1, 3, 48, 48)).shape == (1, 2)
    assert torch.equal(
        classifier.blocks[0].fusion[0].norm1.weight, model.backbone.body.blocks[0].fusion[0].norm1.weight
    )


def test_what_cannot_be_is_told(small, tmp_path):
    create, settings = _MODELS["detector"]
    model = create("ti", num_classes=3, width=64, **_SMALL, **settings)
    path = save(model.state_dict(), model.config, tmp_path / "a.safetensors")
    with pytest.raises(ConversionError, match=r"width is 64; that cannot be changed"):
        load_weights(path, width=96)
    with pytest.raises(
        ConversionError, match="task must be 'classification', 'detection', 'segmentation'; got 'boxes'"
    ):
        load_weights(small, task="boxes", num_classes=2)
    with pytest.raises(TypeError, match="num_classes is missing"):
        load_weights(small, task="detection")
    with pytest.raises(ConversionError, match="width must be a multiple of 32; got 100"):
        load_weights(small, task="detection", num_classes=2, width=100)
    state = model.state_dict()
    del state["head.regression_head.bbox_reg.bias"]
    with pytest.raises(
        ConversionError, match=r"its settings \(ti, detection\): 1 missing \(head\.regression_head\.bbox"
    ):
        save(state, model.config, tmp_path / "b.pth")
    with pytest.raises(
        ConversionError, match=r"looks like a detector or a segmenter, but has no decoder.classifier.bias"
    ):
        to_flax({name: x for name, x in state.items() if not name.startswith("head.")})


def test_a_classifier_that_someone_calls_backbone_body_is_still_a_classifier(tmp_path):
    model = create_model("ti", num_classes=5, **_SIZES)
    state = {f"backbone.body.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save(state, tmp_path / "a.pth")
    assert load_weights(tmp_path / "a.pth").config == model.config


def test_a_published_variant_is_told_from_its_shapes():
    config = get_dense_config("detection", "15-dagger-408", num_classes=80)
    assert infer_config(expected_shapes(config)) == config


def test_the_flax_model_runs_as_loaded(small):
    model = load_flax(small, task="detection", num_classes=2, width=32, num_convs=1, strides=(12, 24))
    found = nnx.jit(lambda model, x: model.detect(x, max_detections=5))(model, jax.numpy.zeros((1, 48, 48, 3)))
    assert {name: x.shape for name, x in found.items()} == {
        "boxes": (1, 5, 4),
        "scores": (1, 5),
        "labels": (1, 5),
        "valid": (1, 5),
    }
