"""The script that shows what patch sizes cost and keep: its sizes, and its table."""

import pytest

from tests.docs.scripts import load_script
from train.main import parse_flags


@pytest.fixture(scope="module")
def script():
    return load_script("patch_sizes_digits")


def test_every_size_divides_and_equal_shares_of_them_cost_what_one_of_them_does(script):
    config = parse_flags([*script.SETTINGS, "--patch-sizes", *script.SIZES])
    assert ",".join(map(str, config.model_config(10).patch_size)) == script.OWN
    gmac = script.gmacs()
    assert sum(gmac.values()) / len(gmac) == pytest.approx(gmac[script.OWN], rel=0.05)


def test_the_table_sets_auto_beside_blind_shares_of_the_same_work(script):
    printed = (
        "top-1 88.50 %\nallocated     images by patch size 24,32: 30, 12,16: 10, 6,16: 0; 0.011 GMAC each on average"
    )
    counts = script.counts_of(printed)
    assert counts == {"24,32": 30, "12,16": 10, "6,16": 0}
    flexible = dict.fromkeys(script.SIZES, 80.0) | {"12,16": 90.0, "auto": 88.5}
    top1 = {"fixed": dict.fromkeys(script.SIZES, 50.0), "flexible": flexible, "continued": {**flexible, "auto": 85.0}}
    gmac = {"12,16": 0.0220, "24,32": 0.0076, "6,16": 0.0326}
    head, _, first, own, last, chosen, blind = script.table(gmac, top1, counts)
    assert head.count("|") == first.count("|") == chosen.count("|") == 7
    assert first == "| 24,32 | 0.0076 | 50.00 % | 80.00 % | 80.00 % | 30 |"
    assert own == "| 12,16 (own) | 0.0220 | 50.00 % | 90.00 % | 90.00 % | 10 |" and last.startswith("| 6,16 |")
    assert chosen == "| `auto` | 0.0112 | - | 88.50 % | 85.00 % | 40 |"
    assert blind.endswith("| 0.0112 | - | 82.50 % | 82.50 % | 40 |")
