"""`POST /predict`: the answers of train.predict, by any way of sending pictures, in whatever batch they travelled."""

import base64
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from tests.train.inference.server.conftest import CLASSES, ToldEngine, encoded
from train.inference.server.engines.engine import batch_sizes
from train.predict import main as predict_main

_JPEG = {"Content-Type": "image/jpeg"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    kinds = ["PNG", "JPEG", "WEBP", "GIF", "BMP"]
    paths = [folder / f"{number}.{kind.lower()}" for number, kind in enumerate(kinds)]
    for number, (path, kind) in enumerate(zip(paths, kinds, strict=True)):
        path.write_bytes(encoded((70 + 20 * number, 60), seed=number, kind=kind))
    return paths


@pytest.fixture
def predicted(small_weights, files, capsys):
    """What the command says of the files."""
    argv = [f"--weights={small_weights}", "--precision=float32", "--format=jsonl", "--top-k=8", "--batch-size=5"]
    assert predict_main([*argv, *map(str, files)]) == 0
    return [json.loads(line)["predictions"] for line in capsys.readouterr().out.splitlines()]


def _same(told, predicted):
    by_class = {one["class"]: (one["index"], one["probability"]) for one in told}
    assert len(told) == len(predicted)
    for one in predicted:
        index, probability = by_class[one["class"]]
        assert index == one["index"]
        assert probability == pytest.approx(one["probability"], abs=1e-5)
    assert [one["probability"] for one in told] == sorted((one["probability"] for one in told), reverse=True)


def test_a_picture_gets_the_commands_answer_whatever_batch_it_travelled_in(serving, small_engine, files, predicted):
    client = serving(small_engine, batching_delay=0.05)

    def ask(place):
        answer = client.post("/predict?top_k=8", content=files[place].read_bytes(), headers=_JPEG)
        return answer.json()["results"][0]["predictions"]

    for place in range(len(files)):  # alone
        _same(ask(place), predicted[place])
    with ThreadPoolExecutor(20) as pool:  # with others
        places = [number % len(files) for number in range(40)]
        for place, told in zip(places, pool.map(ask, places), strict=True):
            _same(told, predicted[place])
    metrics = client.get("/metrics").text
    assert "crossvit_batch_pictures_sum 45.0" in metrics
    batches = float(metrics.split("crossvit_batch_pictures_count ")[1].split()[0])
    assert batches < 40  # some of them had neighbours


def test_several_pictures_are_answered_in_their_order(serving, small_engine, files, predicted):
    client = serving(small_engine)
    contents = [path.read_bytes() for path in files]
    form = client.post("/predict?top_k=8", files=[("pictures", (str(n), one)) for n, one in enumerate(contents)])
    texts = [base64.b64encode(one).decode() for one in contents]
    of_json = client.post("/predict", json={"pictures": texts, "top_k": 8})
    single = client.post("/predict", json={"picture": texts[0], "top_k": 8})
    for answer, count in ((form, 5), (of_json, 5), (single, 1)):
        assert answer.status_code == 200
        results = answer.json()["results"]
        assert len(results) == count
        for result, expected in zip(results, predicted[:count], strict=True):
            _same(result["predictions"], expected)


def test_top_five_unless_another_number_is_asked_for(serving, small_engine, files):
    client, content = serving(small_engine), files[0].read_bytes()
    for query, count in (("", 5), ("?top_k=1", 1), ("?top_k=1000", len(CLASSES))):
        results = client.post(f"/predict{query}", content=content).json()["results"]
        assert len(results[0]["predictions"]) == count


def test_pictures_are_turned_as_training_turned_them(serving, photographs, tmp_path):
    picture = photographs[0].resize((80, 60))
    turned = tmp_path / "turned.jpg"
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(turned, exif=exif)
    engine = ToldEngine()
    engine.transform = replace(engine.transform, exif="apply")
    seen = []
    engine.compute = lambda images: (seen.append(images[0]), [[0.0, 1.0]])[1]
    serving(engine).post("/predict", content=turned.read_bytes())
    assert seen[0].shape == (48, 48, 3)
    expected = engine.transform({"image": turned.read_bytes(), "label": 0, "name": ""})["image"]
    assert (seen[0] == expected).all()
    as_stored = replace(engine.transform, exif="keep")({"image": turned.read_bytes(), "label": 0, "name": ""})["image"]
    assert (seen[0] != as_stored).any()


@pytest.mark.parametrize(
    ("largest", "devices", "sizes"),
    [(1, 1, (1,)), (8, 1, (1, 2, 4, 8)), (6, 1, (1, 2, 4, 6)), (8, 4, (4, 8)), (3, 4, (4,))],
)
def test_batches_have_few_sizes_which_the_devices_can_share(largest, devices, sizes):
    assert batch_sizes(largest, devices=devices) == sizes
