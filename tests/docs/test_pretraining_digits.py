"""The script that shows what pre-training on digits is worth: its pictures, and how it judges features."""

import numpy as np
import pytest
from PIL import Image

from tests.docs.scripts import load_script


@pytest.fixture(scope="module")
def script():
    return load_script("pretraining_digits")


def test_labels_are_few_and_held_out_digits_are_nowhere_to_be_trained_on(script, tmp_path):
    pixels, labels, held_out = script.read_digits()
    assert (len(pixels), held_out.sum()) == (1797, 359)
    script.write_pictures(tmp_path, pixels, labels, held_out)
    assert len(list((tmp_path / "pictures").iterdir())) == 1438
    for seed in range(script.SEEDS):
        few = sorted((tmp_path / f"few-{seed}" / "train").rglob("*.png"))
        indices = {int(path.stem.partition("-")[0]) for path in few}
        assert len(indices) == 100 and len(few) == 100 * script.COPIES and not held_out[list(indices)].any()
        assert all(labels[int(path.stem.partition("-")[0])] == int(path.parent.name) for path in few)
        assert len(list((tmp_path / f"few-{seed}" / "val").rglob("*.png"))) == 359
    first = next((tmp_path / "pictures").iterdir())
    np.testing.assert_array_equal(np.asarray(Image.open(first)), pixels[int(first.stem.partition("-")[0])])


def test_features_that_tell_digits_apart_are_judged_so(script):
    labels, held_out = np.arange(400) % 10, np.arange(400) >= 300
    noise = np.random.default_rng(0).normal(size=(400, 10))
    told = np.eye(10)[labels] + 0.01 * noise
    assert script.judge("told", told, labels, held_out).count("100.00 %") == 2
    assert "100.00 %" not in script.judge("noise", noise, labels, held_out)


def test_one_picture_for_all_is_wrong_by_the_distance_from_the_median(script):
    pixels = np.repeat(np.array([0, 0, 255, 0, 255], np.uint8), 64).reshape(5, 8, 8)
    held_out = np.array([False, False, False, True, True])  # the median of the others is black
    white = np.mean([1 / 0.229, 1 / 0.224, 1 / 0.225])
    assert script.loss_of_one_picture(pixels, held_out, (16, 16), 2) == pytest.approx(2 * white / 2, rel=1e-5)
