"""The tables of the variants: what is counted, beside the paper's figures and our own count; its rows on pages."""

from pathlib import Path

import pytest

from crossvit_jax.config import get_config
from crossvit_torch import create_detector
from tests.docs.scripts import load_script
from train.cost.flops import flops_per_image, macs_per_image

_ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    return load_script("variants")


def test_flops_are_those_of_the_paper_without_the_keys_and_values_that_need_not_be_computed(script):
    _, parameters, macs = script.counted(script.create_model, "ti")
    assert parameters == 7_014_800
    assert macs / 1e9 == pytest.approx(1.6, abs=0.05)
    forward = flops_per_image(get_config("ti"))
    assert forward == 2 * macs_per_image(get_config("ti"))
    assert 0.95 < forward / (2 * macs) < 0.99
    # the gradient of a product is two more, but images need none
    assert 2.95 < flops_per_image(get_config("ti"), gradient=True) / forward < 3


def test_a_class_more_costs_a_detector_its_filters_at_every_point(script):
    few, more = (
        script.counted(lambda name, classes=classes: create_detector(name, num_classes=classes), "ti")[1:]
        for classes in (3, 4)
    )
    assert more[0] - few[0] == 9 * 128 + 1
    assert more[1] - few[1] == (40**2 + 20**2 + 10**2 + 5**2) * 9 * 128


def test_the_pages_have_the_rows_that_are_printed(script, monkeypatch):
    monkeypatch.setattr(script, "TOP1", {"9-dagger": script.TOP1["9-dagger"]})
    pages = {"README.md": script.classifiers, "docs/detection-and-segmentation.md": script.dense_models}
    for page, rows in pages.items():
        for cells in rows():
            assert f"| {' | '.join(cells)} |" in (_ROOT / page).read_text()
