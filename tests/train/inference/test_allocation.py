"""`--patch-size auto`: a patch size within a budget, and one for each picture."""

import json

import numpy as np
import pytest
from PIL import Image

import train.inference.allocation as allocation
from convert import load_weights, save
from convert.errors import ConversionError, SettingsError
from convert.metadata import describe, understand
from tests.command_line import printed_by, refusal
from tests.train.small_weights import save_small, small_config
from train.cost.flops import macs_per_image
from train.data.entropies import grey_entropy
from train.evaluate import main as evaluate
from train.inference.allocation import affordable, allocating
from train.inference.model import load_classifier
from train.predict import main as predict

SIZES = ((12, 16), (24, 32))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights that were trained with two patch sizes, of pictures of which half had less than 4 bits."""
    folder = tmp_path_factory.mktemp("weights")
    plain = load_weights(save_small(folder / "plain.safetensors", "abc"))
    known = {"class_names": plain.class_names, "patch_sizes": SIZES, "entropies": (4.0,)}
    return save(plain.tensors, plain.config, folder / "w.safetensors", **known)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Ten pictures in two folders, every third of 2 bits, the others of about 7; one of 0; and one that is none."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(10):
        drawn = np.random.default_rng(number)
        levels = 256 if number % 3 else 4
        pixels = drawn.integers(levels, size=(48, 48, 1)).repeat(3, axis=2) * (255 // (levels - 1))
        place = folder / "ab"[number % 2]
        place.mkdir(exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(place / f"{number}.png")
    (folder / "c").mkdir()
    Image.new("RGB", (48, 48)).save(folder / "c" / "c.png")
    (folder / "a" / "5.txt.png").write_bytes(b"no picture")
    return folder


def test_the_entropy_is_that_of_the_shares_of_grey_levels():
    pixels = np.zeros((3, 4, 4, 3), np.uint8)
    pixels[1, :2] = 255  # two levels, half each
    pixels[2] = np.arange(16).reshape(4, 4, 1) * 16
    np.testing.assert_allclose(grey_entropy(pixels), [0, 1, 4], rtol=1e-12)


def _lines(*flags):
    return [json.loads(line) for line in printed_by(lambda argv: 1 - predict(argv), *flags).splitlines()]


def test_each_picture_is_predicted_at_the_patch_size_of_its_entropy_and_in_its_place(weights, pictures, capsys):
    flags = ["--weights", weights, "--format=jsonl", "--batch-size=3", pictures]
    found = _lines(*flags, "--patch-size=auto")
    of_sizes = {size: _lines(*flags, f"--patch-size={size[0]},{size[1]}") for size in SIZES}
    assert len(found) == 11  # and the damaged one is left out
    for place, line in enumerate(found):
        with Image.open(line["path"]) as picture:
            simple = grey_entropy(np.asarray(picture)[None])[0] < 4
        right, other = (of_sizes[size][place] for size in (SIZES[::-1] if simple else SIZES))
        assert line["path"] == right["path"] == other["path"]
        told, expected, wrong = ({p["class"]: p["probability"] for p in x["predictions"]} for x in (line, right, other))
        assert told == pytest.approx(expected, abs=1e-5)
        assert told != pytest.approx(wrong, abs=1e-3)


def test_an_evaluation_adds_up_what_each_size_gives(weights, pictures, tmp_path):
    flags = ["--weights", weights, "--dataset", f"folder:{pictures}", "--split=all", "--batch-size=4"]
    told = printed_by(evaluate, *flags, "--patch-size=auto", "--output", tmp_path / "auto")
    config = small_config(3)
    gmacs = (6 * macs_per_image(config) + 5 * macs_per_image(config.at_patch_size((24, 32)))) / 11 / 1e9
    assert f"allocated     images by patch size 24,32: 5, 12,16: 6; {gmacs:.3f} GMAC each on average" in told
    for size in SIZES:
        printed_by(evaluate, *flags, f"--patch-size={size[0]},{size[1]}", "--output", tmp_path / str(size[0]))
    rows = {name: (tmp_path / name / "predictions.csv").read_text().splitlines()[1:] for name in ("auto", "12", "24")}
    simple = [
        row.partition(",")[0].rpartition("/")[2] in ("0.png", "3.png", "6.png", "9.png", "c.png")
        for row in rows["auto"]
    ]
    assert sum(simple) == 5
    expected = [rows["24" if low else "12"][place] for place, low in enumerate(simple)]
    assert [row.split(",")[:3] for row in rows["auto"]] == [row.split(",")[:3] for row in expected]
    result = json.loads((tmp_path / "auto" / "evaluation.json").read_text())
    assert (result["patch_size"], result["images"], result["bad_images"]) == ("auto", 11, 1)


def test_of_the_sizes_within_the_budget_the_one_with_most_patches_is_taken(weights, monkeypatch):
    times = {(6, 8): 9.0, (12, 16): 4.0, (24, 32): 1.0}
    monkeypatch.setattr(allocation, "milliseconds", lambda classifier, batch: times[classifier.config.patch_size])

    def load(size):
        return load_classifier(str(weights), patch_size=size)

    classifier, (note,) = affordable(load, lambda _: 2, 5.0)
    assert (classifier.config.patch_size, note) == ((12, 16), "patch size 12,16 takes 4 ms a picture, of 5: taken")
    classifier, (note,) = affordable(load, lambda _: 2, 1.0)
    assert classifier.config.patch_size == (24, 32)
    assert note == "patch size 12,16 takes 4 ms a picture, 24,32 takes 1 ms a picture, of 1: taken"
    with pytest.raises(SettingsError, match=r"--budget-ms 0\.5: no patch size is fast enough: 12,16 takes 4 ms"):
        affordable(load, lambda _: 2, 0.5)


def test_weights_that_were_trained_with_one_size_get_no_more_patches_and_a_warning(tmp_path, monkeypatch):
    plain = str(save_small(tmp_path / "w.safetensors", "abc"))
    times = {(6, 8): 9.0, (12, 16): 4.0, (24, 32): 1.0}
    monkeypatch.setattr(allocation, "milliseconds", lambda classifier, batch: times[classifier.config.patch_size])
    classifier, _ = affordable(lambda size: load_classifier(plain, patch_size=size), lambda _: 2, 100.0)
    assert classifier.config.patch_size == (12, 16)  # not 6,8
    _, (note,) = affordable(lambda size: load_classifier(plain, patch_size=size), lambda _: 2, 2.0)
    assert note.endswith("taken; the weights were not trained with it, and lose accuracy")
    with pytest.raises(SettingsError, match="needs --budget-ms, or weights that tell the entropies"):
        allocating(lambda size: load_classifier(plain, patch_size=size))


def test_a_budget_is_kept_by_a_command_and_what_was_measured_is_told(weights, pictures, capsys):
    found = _lines("--weights", weights, "--format=jsonl", "--patch-size=auto", "--budget-ms=60000", pictures)
    assert len(found) == 11
    assert "note: patch size 12,16 takes " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--budget-ms=3"], "--budget-ms is for --patch-size auto"),
        (["--patch-size=12,16", "--budget-ms=3"], "--budget-ms is for --patch-size auto"),
        (["--patch-size=auto", "--budget-ms=0"], "argument --budget-ms: must be a number above 0; got '0'"),
        (["--patch-size=auto", "--budget-ms=nan"], "argument --budget-ms: must be a number above 0; got 'nan'"),
        (["--patch-size=all"], "argument --patch-size: must be pixels, a number for each branch"),
        (["--patch-size=auto", "--attention=maps"], "--attention draws maps of one size"),
        (["--patch-size=auto", "--image-size=72"], "at this image size not all patch sizes of training divide"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(weights, pictures, capsys, flags, message):
    assert message in refusal(capsys, "python -m train.predict", predict, "--weights", weights, pictures, *flags)


@pytest.mark.parametrize("entropies", [[4.0, 5.0], [], [9.0], ["4"], [float("nan")], 4.0])
def test_entropies_that_part_nothing_are_refused(entropies):
    description = json.loads(json.dumps(describe(small_config(3), None, patch_sizes=SIZES, entropies=(4.0,))))
    assert understand(description)
    with pytest.raises(ConversionError, match="entropies"):
        understand(description | {"entropies": entropies})
