"""Whole models: Flax = torch twin = timm, on every variant."""

import pytest

from crossvit_jax.config import list_variants
from tests.compilation import AS_FOR_USERS, QUICKLY
from tests.parity.reference import (
    GRADIENT_BOUND,
    GRADIENT_VARIANTS,
    OUTPUT_BOUND,
    PARAMETER_BOUND,
    PRECISIONS,
    output_errors,
    stages_run_once,
    whole_gradient_errors,
)


def _how(variant, precision):
    """One variant is compiled whole, and as for users in its usual precision."""
    return {
        "compiler_options": AS_FOR_USERS if (variant, precision) == ("ti", "float32") else QUICKLY,
        "in_pieces": variant != "ti",
    }


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("variant", list_variants())
def test_every_variant_has_timms_logits_and_features(variant, precision):
    batch = 1 if variant.endswith("408") else 2  # there, an image takes four times as long
    with stages_run_once():  # whether the same arguments go to them twice, the settings below hold
        result = output_errors(variant, precision, batch=batch, **_how(variant, precision))
    for twin, errors in result.items():
        assert max(errors.values()) <= OUTPUT_BOUND[precision], (twin, errors)


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("variant", GRADIENT_VARIANTS)
def test_the_whole_gradient_equals_timms(variant, precision):
    how = _how(variant, precision)
    if "dagger" in variant and precision == "float64":
        # convolutions whose patches overlap: compiled quickly, the images' gradient would compute for a minute
        how = {"compiler_options": AS_FOR_USERS}
    whole, parts = whole_gradient_errors(variant, precision, **how)
    assert whole <= GRADIENT_BOUND[precision]
    assert {name: e for name, e in parts.items() if e > PARAMETER_BOUND[precision]} == {}


# what timm can do besides its defaults; "size" is that of the images given to the model
SETTINGS = [
    {"image_size": 120},
    {"image_size": 360},
    {"image_size": 480},
    {"image_size": 48, "image_scale": (1.0, 2 / 3)},
    {"in_chans": 1},
    {"num_classes": 0},
    {"num_classes": 7},
    {"global_pool": "avg"},
    {"crop_scale": True},
    {"size": 224},
    {"size": (300, 260), "crop_scale": True},
]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_every_setting_of_timm_has_timms_logits_and_features(settings, precision):
    # one short stage: the settings act before and after the stages, and compiling takes the time
    for twin, errors in output_errors("ti", precision, stages=1, depth=(1, 2), **settings).items():
        assert max(errors.values()) <= OUTPUT_BOUND[precision], (twin, errors)


def test_gradients_under_average_pooling_equal_timms():
    settings = {"global_pool": "avg", "image_size": 120, "stages": 2, "depth": (1, 1)}
    _, parts = whole_gradient_errors("ti", "float64", **settings)
    assert max(parts.values()) <= GRADIENT_BOUND["float64"], parts
