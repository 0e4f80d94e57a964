"""`predict`, and pretrained weights by a variant's name."""

import numpy as np
import pytest
import torch
from PIL import Image

import convert
import crossvit_jax
from convert import ConversionError, list_pretrained, load_flax, load_torch, predict
from crossvit_jax import list_variants, preprocess_image
from crossvit_jax.preprocess import UnreadableImage
from tests.convert.conftest import CLASS_NAMES


@pytest.fixture
def pictures(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 60, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels[0]).save(tmp_path / "first.png")
    return [tmp_path / "first.png", Image.fromarray(pixels[1]), pixels[2]]


def test_pictures_get_the_likeliest_classes_by_name(small, pictures):
    model = load_flax(small)
    model.train()  # which stays so, and changes nothing
    twin = load_torch(small)
    assert model.class_names == twin.class_names == CLASS_NAMES
    images = np.stack([preprocess_image(picture, model.config) for picture in pictures])
    with torch.inference_mode():
        expected = torch.softmax(twin(torch.tensor(images).permute(0, 3, 1, 2)), 1).numpy()
    for found in (predict(model, pictures, top_k=2), predict(small, pictures, top_k=2)):
        for row, best in zip(expected, found, strict=True):
            order = np.argsort(-row)[:2]
            assert [one.class_name for one in best] == [CLASS_NAMES[index] for index in order]
            np.testing.assert_allclose([one.probability for one in best], row[order], rtol=1e-4)
    assert not model.pos_drop.deterministic
    assert {one.class_name for one in predict(model, pictures[:1], class_names="vwxyz")[0]} == set("vwxyz")
    assert predict(model, []) == []


def test_what_cannot_be_predicted_is_told(small, pictures, tmp_path):
    with pytest.raises(ConversionError, match="the model has no head: it does not classify colour images"):
        predict(load_flax(small, num_classes=0), pictures)
    with pytest.raises(ConversionError, match="4 class names for 5 classes"):
        predict(small, pictures, class_names="abcd")
    with pytest.raises(UnreadableImage, match="No such file"):
        predict(small, [tmp_path / "none.png"])


def test_a_variant_stands_for_its_published_weights_only_when_these_are_asked_for(small, monkeypatch):
    assert [*list_pretrained()] == [*list_variants()]
    asked, load_weights = [], convert.models.load_weights

    def load(source, **changes):
        asked.append(source)
        return load_weights(small, **changes)

    monkeypatch.setattr("convert.models.load_weights", load)
    assert load_flax("crossvit_tiny_224", pretrained=True).config.name == "custom"
    load_torch("ti", pretrained=True)
    assert asked == ["hf-hub:timm/crossvit_tiny_240.in1k"] * 2
    with pytest.raises(ConversionError, match="pretrained weights are those of a variant"):
        load_flax("tii", pretrained=True)
    with pytest.raises(TypeError, match=r"convert\.load_flax\('ti', pretrained=True\)"):
        crossvit_jax.create_model("ti", pretrained=True)
