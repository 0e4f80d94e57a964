"""The script that shows what patch sizes cost and keep: its sizes, and its table."""

import pytest

from crossvit_jax.config import get_config
from tests.docs.scripts import load_script


@pytest.fixture(scope="module")
def script():
    return load_script("patch_sizes_digits")


def test_every_size_divides_and_equal_shares_of_them_cost_what_one_of_them_does(script):
    config = get_config("ti", image_size=96, image_scale=(1.0, 2 / 3))
    assert ",".join(map(str, config.patch_size)) == script.OWN
    for size in script.SIZES:
        assert config.at_patch_size(tuple(map(int, size.split(","))))
    gmac = script._gmacs()
    assert sum(gmac.values()) / len(gmac) == pytest.approx(gmac["16,16"], rel=0.05)


def test_the_table_sets_auto_beside_blind_shares_of_the_same_work(script):
    printed = "allocated     images by patch size 24,32: 30, 16,16: 0, 12,16: 10, 8,16: 0; 0.059 GMAC each on average\n"
    auto = script.auto_of({"top1": 88.5, "printed": f"top-1         88.50 %\n{printed}"})
    top1 = {"fixed": dict.fromkeys(script.SIZES, 50.0), "flexible": dict.fromkeys(script.SIZES, 80.0)}
    top1["flexible"]["12,16"] = 90.0
    gmac = {"24,32": 0.0383, "12,16": 0.1215, "16,16": 0.1106, "8,16": 0.1579}
    _, _, first, second, own, _, chosen, blind = script.table(gmac, top1, auto)
    assert first == "| 24,32 | 0.038 | 50.00 % | 80.00 % | 30 |"
    assert second.startswith("| 16,16 |") and own == "| 12,16 (own) | 0.121 | 50.00 % | 90.00 % | 10 |"
    assert chosen == "| `auto` | 0.059 | - | 88.50 % | 40 |"
    assert blind.endswith("| 0.059 | - | 82.50 % | 40 |")
