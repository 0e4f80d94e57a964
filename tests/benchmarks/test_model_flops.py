"""FLOPs and parameters of the variants, beside those of the paper."""

import pytest

from benchmarks.model_table import multiply_adds, parameters
from crossvit_jax.config import get_config, get_dense_config
from train.cost.flops import flops_per_image, macs_per_image


def test_flops_are_those_of_the_paper_without_the_keys_and_values_that_need_not_be_computed():
    macs = multiply_adds(get_config("ti"))
    assert macs / 1e9 == pytest.approx(1.6, abs=0.05)
    forward = flops_per_image(get_config("ti"))
    assert forward == 2 * macs_per_image(get_config("ti"))
    assert 0.95 < forward / (2 * macs) < 0.99
    # the gradient of a product is two more, but images need none
    assert 2.95 < flops_per_image(get_config("ti"), gradient=True) / forward < 3


def test_the_model_table_counts_what_the_paper_counts():
    assert parameters(get_config("ti")) == 7_014_800
    assert multiply_adds(get_config("9-dagger")) / 1e9 == pytest.approx(2.0, abs=0.05)


def test_a_class_more_costs_a_detector_its_filters_at_every_point():
    few, more = (get_dense_config("detection", "ti", num_classes=classes) for classes in (3, 4))
    assert parameters(more) - parameters(few) == 9 * 128 + 1
    assert multiply_adds(more) - multiply_adds(few) == (40**2 + 20**2 + 10**2 + 5**2) * 9 * 128
