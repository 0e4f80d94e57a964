"""The weights that runs of detection and segmentation start from, made to fit them."""

import dataclasses

import numpy as np
import pytest
import torch

import convert
import crossvit_torch
from convert.changes.dense import class_axes
from convert.errors import SettingsError
from tests.small_model import small_config, small_detector, small_segmenter
from train.recipes import RECIPES
from train.tasks.begin import starting_model

_NAMES = ("cat", "dog", "owl", "pig")
_MODELS = {
    "detection": (crossvit_torch.CrossViTDetector, small_detector(num_classes=4, strides=(6, 12, 24))),
    "upernet": (crossvit_torch.CrossViTSegmenter, small_segmenter(strides=(12, 24))),
    "mask": (crossvit_torch.CrossViTSegmenter, small_segmenter(decoder="mask", num_blocks=1)),
}
_OF_CLASSES = {  # and along which axis
    "detection": {f"head.classification_head.cls_logits.{name}": 0 for name in ("weight", "bias")},
    "upernet": {f"decoder.classifier.{name}": 0 for name in ("weight", "bias")},
    "mask": {"decoder.cls_emb": 1, "decoder.mask_norm.weight": 0, "decoder.mask_norm.bias": 0},
}


@pytest.fixture(params=_MODELS)
def source(request, tmp_path):
    """Saved weights of a detector or segmenter for four classes: save(class_names) -> (kind, state, path)."""
    build, config = _MODELS[request.param]
    model = build(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}

    def save(class_names):
        return (
            request.param,
            state,
            convert.save(state, config, tmp_path / "w.safetensors", class_names=class_names, overwrite=True),
        )

    return save


def _begin(kind, path, class_names, **settings):
    task = "detection" if kind == "detection" else "segmentation"
    config = dataclasses.replace(RECIPES[task], init=str(path), **settings)
    model_config, weights = starting_model(config, class_names, None, starts_anew=True)
    assert model_config == weights.config and model_config.num_classes == len(class_names)
    return weights


def _changed(kind, weights, state):
    """The tensors that are not as they were stored."""
    assert weights.tensors.keys() == state.keys()
    return {name for name, array in state.items() if not np.array_equal(weights.tensors[name], array)}


def test_the_tensors_of_the_classes_are_known(source):
    kind, _, _ = source(None)
    assert class_axes(_MODELS[kind][1]) == _OF_CLASSES[kind]


def test_the_last_layer_is_kept_for_the_same_classes_and_for_as_many_without_names(source):
    kind, state, path = source(_NAMES)
    weights = _begin(kind, path, _NAMES)
    assert not _changed(kind, weights, state)
    assert "the last layer is kept: it is for these classes" in weights.notes
    _, _, path = source(None)
    weights = _begin(kind, path, _NAMES)
    assert not _changed(kind, weights, state)
    assert "the last layer is kept: it has 4 classes too, and their names are not known" in weights.notes


def test_its_outputs_are_put_into_the_order_of_the_data_set(source):
    kind, state, path = source(_NAMES)
    weights = _begin(kind, path, ("pig", "cat", "owl", "dog"))
    for name, array in weights.tensors.items():
        axis = _OF_CLASSES[kind].get(name)
        expected = state[name] if axis is None else np.take(state[name], [3, 0, 2, 1], axis)
        np.testing.assert_array_equal(array, expected, err_msg=name)
    assert any(note.endswith("and its outputs are put into their order") for note in weights.notes)


def test_other_classes_get_a_new_last_layer_that_follows_the_seed(source):
    kind, state, path = source(_NAMES)
    names = ("cat", "dog", "owl", "elk")
    weights, again = (_begin(kind, path, names, seed=1) for _ in range(2))
    assert _changed(kind, weights, state) == _OF_CLASSES[kind].keys()
    assert "new last layer: the 4 classes are others than those of the weights" in weights.notes
    assert weights.class_names is None
    assert not _changed(kind, again, weights.tensors)
    if kind == "detection":
        other = _begin(kind, path, names, seed=2)
        assert _changed(kind, other, weights.tensors) == {"head.classification_head.cls_logits.weight"}


def test_another_number_of_classes_gets_a_new_last_layer_and_that_is_told(source):
    kind, state, path = source(_NAMES)
    weights = _begin(kind, path, ("cat", "dog"), seed=1)
    assert {name for name in state if weights.tensors[name].shape != state[name].shape} == _OF_CLASSES[kind].keys()
    assert any("new for 2 classes instead of 4, and untrained" in note for note in weights.notes)


@pytest.mark.parametrize("task, part", [("detection", "head"), ("segmentation", "decoder")])
def test_a_classifier_gives_the_body_made_to_fit_and_what_is_new_is_told(task, part, tmp_path):
    config = small_config(3).replace(in_chans=1)
    state = crossvit_torch.CrossViT(config).state_dict()
    path = convert.save(state, config, tmp_path / "w.safetensors", class_names="abc")
    weights = _begin(task, path, _NAMES, width=32)
    assert weights.config.in_chans == 3 and weights.class_names is None
    notes = "; ".join(weights.notes)
    assert "head for 3 classes dropped" in notes and "from 1 to 3 channels" in notes
    assert f"new for {task}, and untrained: backbone.pyramid, {part}" in notes
    name = "blocks.0.fusion.0.attn.wq.weight"
    np.testing.assert_array_equal(weights.tensors[f"backbone.body.{name}"], state[name])


def test_what_does_not_fit_is_one_line(source):
    kind, state, path = source(_NAMES)
    with pytest.raises(SettingsError, match="holds custom, not the variant s"):
        _begin(kind, path, _NAMES, variant="s")
    with pytest.raises(SettingsError, match="that cannot be changed"):
        _begin(kind, path, _NAMES, width=128)
    state["backbone.pyramid.fuse.bias"][0] = np.nan
    _, _, path = source(_NAMES)
    with pytest.raises(SettingsError, match=r"--init .*w\.safetensors: "):
        _begin(kind, path, _NAMES)
