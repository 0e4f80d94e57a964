"""The script that shows what fewer tokens cost and bring: its table and its picture."""

import pytest
from PIL import Image

from crossvit_jax.config import get_config
from tests.docs.scripts import load_script


@pytest.fixture(scope="module")
def script():
    return load_script("fewer_tokens_digits")


def test_the_table_tells_speed_and_the_share_of_top1_that_is_kept(script, tmp_path):
    accuracy = {name: {"at once": 45.0, "tuned": 81.0} for name in script.SETTINGS}
    accuracy["none"] = {"at once": 90.0, "tuned": 90.9}
    speed = [
        {"variant": variant, "batch": batch, "setting": name, "ratio": 1.0 if name == "none" else 1.25}
        for variant in script.VARIANTS
        for batch in script.BATCHES
        for name in ("none", *script.SETTINGS.values())
    ]
    _, _, full, first, *_ = lines = script.table(accuracy, speed)
    assert len(lines) == 3 + len(script.SETTINGS)
    assert full == "| none | 1.00 | 1.00 | 1.00 | 1.00 | 100.0 % (90.00) | 101.0 % (90.90) |"
    assert first == "| merge:4 (merge:1 at 120) | 1.25 | 1.25 | 1.25 | 1.25 | 50.0 % (45.00) | 90.0 % (81.00) |"
    script.draw(accuracy, speed, tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as picture:
        assert len(picture.convert("RGB").getcolors(picture.width * picture.height)) > 10


@pytest.mark.parametrize("size, which", [(120, 0), (240, 1)])
def test_every_setting_can_be_at_its_size(script, size, which):
    for setting in (pair[which] for pair in script.SETTINGS.items()):
        assert get_config("ti", image_size=size, image_scale=(1.0, 14 / 15), reduce_tokens=setting)
