"""The page for people, in a browser; and the description of the routes."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from crossvit_jax.preprocess import evaluation_crop, read_image
from tests.train.inference.server.conftest import ToldEngine, encoded
from train.inference.server.app import Service, make_app
from train.inference.server.limits import Limits


def test_attention_is_told_of_the_picture_as_the_model_saw_it(serving, small_engine, tmp_path):
    client = serving(small_engine)
    picture = encoded((90, 60))
    (tmp_path / "p.png").write_bytes(picture)
    (result,) = client.post("/predict?attention=true", content=picture).json()["results"]
    (plain,) = client.post("/predict", content=picture).json()["results"]
    for told, expected in zip(result["predictions"], plain["predictions"], strict=True):
        assert (told["class"], told["probability"]) == (
            expected["class"],
            pytest.approx(expected["probability"], abs=1e-5),
        )
    attention = result["attention"]
    seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(attention["picture"]))))
    config = small_engine.config
    expected = evaluation_crop(np.asarray(read_image(tmp_path / "p.png")), config.image_size, config.crop_pct)
    np.testing.assert_array_equal(seen, expected)
    order = [(one["branch"], one["kind"], one["over"]) for one in attention["maps"]]
    assert order == [(0, "own", 0), (0, "across", 1), (1, "own", 1), (1, "across", 0)]
    for one in attention["maps"]:
        assert one["grid"] == list(config.grid_size[one["over"]])
        assert len(one["values"]) == one["grid"][0] * one["grid"][1]
        assert sum(one["values"]) + one["token"] == pytest.approx(1, abs=1e-5)
        assert one["region"] == [0, 0, 48, 48]


def test_attention_is_told_for_one_picture_at_a_time(serving, small_engine):
    answer = serving(small_engine).post("/predict?attention=true", files=[("a", encoded())] * 2)
    assert answer.status_code == 400
    assert "one picture at a time" in answer.json()["error"]


def test_the_page_loads_nothing_from_anywhere(serving):
    answer = serving(ToldEngine()).get("/")
    assert answer.headers["content-type"].startswith("text/html")
    assert not re.search(r"""(https?:)?//[a-z]|@import|url\(""", re.sub(r"\s//.*", "", answer.text))
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "an engine for tests" in answer.text
    assert 'data-query="top_k=5"' in answer.text


def test_the_description_has_exactly_the_routes(serving):
    engine = ToldEngine()
    described = serving(engine).get("/openapi.json").json()
    told = {
        (path, method.upper()) for path, what in described["paths"].items() for method in what.keys() - {"parameters"}
    }
    routes = make_app(Service(engine, Limits(pictures=1))).routes
    assert told == {(route.path, method) for route in routes for method in route.methods - {"HEAD"}}
    names = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(described)))
    assert names == set(described["components"]["schemas"])


# --- in a browser ---


def _drop(browser, path):
    """As from a file manager."""
    data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        browser.execute_cdp_cmd("Input.dispatchDragEvent", {"type": kind, "x": 200, "y": 150, "data": data})


def _wait(browser, condition):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 60, poll_frequency=0.02).until(condition)


@pytest.mark.slow
def test_a_picture_that_is_dropped_on_the_page_is_told_with_bars_and_maps(browser, address, small_engine, tmp_path):
    picture, broken = tmp_path / "picture.png", tmp_path / "broken.png"
    picture.write_bytes(encoded((90, 60)))
    broken.write_bytes(picture.read_bytes()[:300])
    expected = small_engine.compute(
        small_engine.transform({"image": picture.read_bytes(), "label": 0, "name": ""})["image"][None]
    )[0]
    browser.get(f"http://{address}/")
    _drop(browser, picture)
    rows = _wait(
        browser,
        lambda page: page.execute_script("""
        return !document.getElementById("answer").hidden &&
            [...document.querySelectorAll("#classes tr")].map(row =>
                [...row.cells].map(cell => cell.textContent).concat(row.querySelector(".bar").style.width))
    """),
    )
    best = np.argsort(-expected)[:5]
    assert [row[0] for row in rows] == ["abcdefgh"[index] for index in best]
    assert [row[2] for row in rows] == [f"{100 * expected[index]:.1f} %" for index in best]
    widths = [float(row[3].removesuffix("%")) for row in rows]
    np.testing.assert_allclose(widths, 100 * expected[best], atol=1e-2)
    maps = browser.execute_script("""
        return [...document.querySelectorAll("#maps canvas")].map(map =>
            [map.width, map.height, new Set(map.getContext("2d").getImageData(0, 0, map.width, map.height).data).size])
    """)
    assert [one[:2] for one in maps] == [[96, 96]] * 4
    assert all(one[2] > 20 for one in maps)  # something is drawn
    seen = browser.execute_script("return [document.getElementById('seen').naturalWidth, 0]")
    assert seen[0] == 48

    _drop(browser, broken)
    error = _wait(
        browser, lambda page: page.execute_script("return document.querySelector('#status.error')?.textContent")
    )
    assert error.startswith("the picture cannot be read")
    assert browser.execute_script("return document.getElementById('answer').hidden")
    severe = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert [message for message in severe if "422" not in message] == []  # no script failed, nothing was blocked


@pytest.mark.slow
def test_the_page_asks_for_the_token_and_sends_the_picture_again(browser, small_engine, tmp_path, listening):
    with listening(Service(small_engine, Limits(pictures=4, token="sesame"))) as address:
        (tmp_path / "picture.png").write_bytes(encoded())
        browser.get(f"http://{address}/")
        assert not browser.find_element("id", "ask").is_displayed()
        browser.find_element("id", "file").send_keys(str(tmp_path / "picture.png"))
        _wait(browser, lambda page: page.find_element("id", "ask").is_displayed())
        browser.find_element("id", "token").send_keys("sesame\n")
        _wait(browser, lambda page: page.find_element("id", "answer").is_displayed())
