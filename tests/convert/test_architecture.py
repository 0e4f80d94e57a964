"""What shapes tell, and what is said when they do not fit."""

from fractions import Fraction

import pytest

from convert.architecture import check, expected_shapes, infer_config
from convert.errors import ConversionError
from convert.tree import shapes_of
from crossvit_jax.config import get_config


@pytest.fixture
def shapes(timm_model):
    return shapes_of(timm_model.state_dict())


def _error(shapes, config=None):
    with pytest.raises(ConversionError) as caught:
        check(shapes, config or infer_config(shapes), "the file")
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_size_scale_classes_and_channels_are_inferred(shapes):
    config = infer_config(shapes)
    assert config == get_config("ti", image_size=48, image_scale=(Fraction(1), Fraction(2, 3)), num_classes=10)
    check(shapes, config, "the file")


def test_channels_missing_bias_and_missing_head_are_inferred(shapes):
    shapes = {n: s for n, s in shapes.items() if not n.endswith("attn.qkv.bias") and not n.startswith("head.")}
    shapes["patch_embed.0.proj.weight"] = (96, 1, 12, 12)
    config = infer_config(shapes)
    assert (config.in_chans, config.qkv_bias, config.num_classes) == (1, False, 0)


def test_the_408_variants_are_known_by_their_scale_at_any_size():
    shapes = expected_shapes(get_config("15-dagger-408", image_size=204))
    assert infer_config(shapes) == get_config("15-dagger-408", image_size=204)
    shapes |= {"pos_embed_0": (1, 401, 192), "pos_embed_1": (1, 197, 384)}
    assert infer_config(shapes).name == "15-dagger"


def test_rectangles_need_their_size(shapes):
    shapes |= {"pos_embed_0": (1, 201, 96), "pos_embed_1": (1, 99, 192)}
    assert "--image-size HxW" in _error(shapes)
    config = infer_config(shapes, (120, 240))
    assert config.image_size == (120, 240)
    check(shapes, config, "the file")
    assert "pos_embed_0 (1, 201, 96) instead of (1, 401, 96)" in _error(shapes, infer_config(shapes, (240, 120 * 3)))


def test_all_faults_are_named_at_once_with_the_variant(shapes):
    del shapes["blocks.1.fusion.0.attn.wq.weight"], shapes["norm.1.bias"]
    shapes["blocks.0.blocks.0.0.extra.weight"] = (3,)
    shapes["cls_token_0"] = (1, 1, 97)
    shapes["head.1.bias"] = (11,)
    message = _error(shapes)
    assert message.startswith("the file does not fit ti (crossvit_tiny_240), the nearest variant: ")
    assert "2 missing (blocks.1.fusion.0.attn.wq.weight, norm.1.bias)" in message or (
        "2 missing (norm.1.bias, blocks.1.fusion.0.attn.wq.weight)" in message
    )
    assert "1 unexpected (blocks.0.blocks.0.0.extra.weight)" in message
    assert "cls_token_0 (1, 1, 97) instead of (1, 1, 96)" in message
    assert "head.1.bias (11,) instead of (10,)" in message


def test_many_names_are_folded_and_none_is_left_out(shapes):
    shapes = {name: shape for name, shape in shapes.items() if not name.startswith("blocks.2.")}
    del shapes["norm.0.bias"]
    message = _error(shapes)
    assert "blocks.2.* (" in message
    assert "norm.0.bias" in message
    assert len(message) < 300


def test_another_width_is_told_with_an_example(shapes):
    wide = {name: tuple(side * 2 if side in (96, 192) else side for side in shape) for name, shape in shapes.items()}
    wide["norm.0.weight"] = (5,)
    message = _error(wide)
    assert "does not fit s (crossvit_small_240)" in message
    assert "norm.0.weight (5,) instead of (192,)" in message


def test_another_architecture_is_no_crossvit():
    with pytest.raises(ConversionError, match=r"no CrossViT.*patch_embed\.proj\.weight"):
        infer_config({"cls_token": (1, 1, 192), "patch_embed.proj.weight": (192, 3, 16, 16), "norm.bias": (192,)})
    with pytest.raises(ConversionError, match="no CrossViT"):
        infer_config({})
