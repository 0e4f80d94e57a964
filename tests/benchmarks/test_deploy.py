"""The benchmark of shipped forms: what it refuses, which images it takes, what it compares, and a whole small run."""

import dataclasses
import importlib.util
import json

import numpy as np
import pytest
from PIL import Image

from benchmarks import rounds as measure
from benchmarks.deploy.__main__ import main
from benchmarks.deploy.forms import REFERENCE, quantize_static
from benchmarks.deploy.measure import BATCHES, measure_forms
from benchmarks.deploy.runs import Run, open_run, pair, read_images
from benchmarks.result import as_json
from benchmarks.table import tables
from benchmarks.task import DeployTask, Form
from benchmarks.worker import Ready, SideFailed
from convert import load_weights, save
from convert.errors import SettingsError
from tests.benchmarks.conftest import HereWorker
from tests.command_line import refusal
from tests.train.small_weights import save_small
from train.config import TrainConfig
from train.evaluate import main as evaluate
from train.inference.dataset import Data
from train.run.folder import write_config

_CLASSES = "abc"
_TOLD = {"load_s": 0.0, "first_result_s": 0.0}


@pytest.fixture
def pictures(tmp_path):
    """A data set of three classes: 12 training images and 9 held-out ones; their blue tells them apart."""
    rng = np.random.default_rng(0)
    for split, count, blue in (("train", 4, 40), ("val", 3, 200)):
        for name in _CLASSES:
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
                pixels = np.array(coarse.resize((48, 48), Image.Resampling.BICUBIC))
                pixels[..., 2] = blue
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return f"folder:{tmp_path / 'pictures'}"


@pytest.fixture
def weights(tmp_path):
    return save_small(tmp_path / "small.safetensors", _CLASSES)


def _run_folder(folder, weights, **settings):
    folder.mkdir()
    (folder / "weights.safetensors").write_bytes(weights.read_bytes())
    write_config(folder, {"train": dataclasses.asdict(TrainConfig(init="x", **settings))})
    return str(folder)


def _refusal(capsys, *args):
    """The one line of a refusal."""
    return refusal(capsys, "python -m benchmarks.deploy", main, *args)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("", "--runs"),
        ("--runs x --repeats 0", "--repeats"),
        ("--runs x --device gpu", "--device"),
        ("--runs x --json /no/such/folder/x.json", "does not exist"),
        ("--runs /no/such/run", "does not exist"),
    ],
)
def test_a_wrong_flag_is_one_line_and_status_2(flags, says, capsys):
    assert says in _refusal(capsys, *flags.split())


def test_without_the_packages_the_extra_is_named(monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "onnxruntime" else found(name, *rest)
    )
    assert "need onnxruntime: pip install -e '.[onnx]'" in _refusal(capsys, "--runs", "x")


def test_a_run_knows_its_data_set_and_other_weights_are_told_it(tmp_path, pictures, weights):
    folder = _run_folder(tmp_path / "run", weights, dataset=pictures)
    for source, given in ((folder, {}), (f"{folder}/weights.safetensors", {}), (str(weights), {"dataset": pictures})):
        run = open_run(source, given)
        assert (run.data.dataset, len(run.data.images), run.qat) == (pictures, 9, None)
    with pytest.raises(SettingsError, match="--dataset is needed"):
        open_run(str(weights), {})


def test_a_qat_run_for_other_integers_is_refused(tmp_path, weights, capsys):
    run = _run_folder(tmp_path / "run", weights, qat="int4")
    assert "was trained with --qat int4" in _refusal(capsys, "--runs", run)


def test_classes_of_another_data_set_are_refused(tmp_path, pictures, capsys):
    weights = save_small(tmp_path / "other.safetensors", "wxyz")
    assert "3 classes, the weights have 4" in _refusal(capsys, "--runs", weights, "--dataset", pictures)


def _run(source, weights, dataset="folder:y", qat=None):
    return Run(source, load_weights(weights), Data(dataset, [], (), "", [], True), np.arange(3), qat)


def test_a_qat_run_joins_the_run_before_it_of_its_model_and_data_set(weights):
    a, b = _run("a", weights), _run("b", weights)
    other = _run("other", weights, dataset="folder:x")
    a8, b8 = _run("a8", weights, qat="int8"), _run("b8", weights, qat="int8")
    assert pair([a, a8, b, other, b]) == [(a, a8), (b, None), (other, None), (b, None)]
    for runs in ([other, a8], [a, a8, b8], [a8]):
        with pytest.raises(SettingsError, match=r"8 was trained with --qat: name it after a run without"):
            pair(runs)


@pytest.mark.parametrize(("count", "most", "taken"), [(12, 4, [0, 3, 6, 9]), (3, 4, [0, 1, 2])])
def test_fewer_images_are_taken_at_even_steps(count, most, taken, tmp_path, monkeypatch):
    weights = load_weights(save_small(tmp_path / "small.safetensors", _CLASSES))
    monkeypatch.setattr(
        "benchmarks.deploy.runs.eval_transform",
        lambda *_: lambda number: {"image": np.zeros((1, 1, 3), np.uint8), "label": number},
    )
    images, labels, unreadable = read_images(range(count), most, weights, tmp_path / "images.npy")
    assert (len(images), labels.tolist(), unreadable) == (len(taken), taken, 0)


def test_a_batch_is_filled_up_and_only_checked_images_are_in_it(tmp_path):
    images = np.arange(5, dtype=np.float32).reshape(5, 1, 1, 1)
    np.save(tmp_path / "images.npy", images)
    task = DeployTask(about={}, forms={}, images=str(tmp_path / "images.npy"), checked=3, batch_size=2)
    assert [batch.ravel().tolist() for batch in task.batches()] == [[0, 1], [2, 2]]


# --- what is compared ---


_FORMS = {
    REFERENCE: Form(runs_in="torch", file="", bytes=4_000_000, dtype="float32"),
    "half": Form(runs_in="onnxruntime", file="", bytes=2_000_000, dtype="float16"),
    "int8": Form(runs_in="onnxruntime", file="", bytes=1_000_000, dtype="int8"),
    "int8 of qat": Form(runs_in="qwix", file="", bytes=1_000_000, dtype="int8", qat=True),
}
_ABOUT = {"run": "runs/x", "variant": "ti", "image_size": [48, 48], "held_out_split": "val", "held_out_images": 21}
_ABOUT |= {"images": 20, "unreadable_images": 1, "calibration_images": 12}


@pytest.fixture
def scripted(monkeypatch):
    """Measures `_FORMS` with sides that answer as told: added to the logits that are expected, or a failure."""
    rng = np.random.default_rng(0)
    expected = {qat: rng.normal(size=(20, 3)).astype(np.float32) for qat in (False, True)}
    monkeypatch.setattr("benchmarks.deploy.measure._logits", lambda weights, task: expected[weights])
    labels = expected[False].argmax(axis=1)
    labels[:4] = (labels[:4] + 1) % 3  # 16 of 20 are right

    def measured(**answers):
        class Scripted(HereWorker):
            @property
            def ready(self):
                answer = answers.get(self.side.replace(" ", "_"), 0.0)
                if isinstance(answer, SideFailed):
                    raise answer
                logits = expected[self.task.forms[self.side].qat][: self.task.checked]
                return Ready({"logits": logits + np.float32(answer)}, {"torch": "2"}, _TOLD)

        monkeypatch.setattr(measure, "Worker", Scripted)
        task = DeployTask(about=_ABOUT, forms=_FORMS, images="x.npy", checked=20, batch_size=max(BATCHES))
        return measure_forms(task, {False: False, True: True}, labels, rounds=2)

    return measured


@pytest.mark.parametrize(
    ("answers", "off"),
    [({}, None), ({"half": 0.2}, "half"), ({"int8": 0.2}, "int8"), ({"int8_of_qat": np.nan}, "int8 of qat")],
)
def test_a_form_beyond_its_bound_is_not_timed_and_the_others_are_at_both_batch_sizes(scripted, answers, off):
    measured = scripted(**answers)
    assert [at.task.batch_size for at in measured] == list(BATCHES)
    for at in measured:
        assert off is None or "not timed" in at.sides[off].failure
        assert {name: len(times.seconds) for name, times in at.sides.items()} == {
            name: 0 if name == off else 2 for name in _FORMS
        }


def _rows(measured):
    (table,) = tables([json.loads(json.dumps(as_json("deploy", measured)))])
    return table, {cells[1]: cells[2:-1] for cells in _cells(table)}


def test_the_table_has_size_ratios_and_points(scripted):
    table, rows = _rows(scripted(int8=0.05))
    assert "runs/x; top-1 on 20 of 21 held-out images (val), 1 more could not be read; static int8" in table
    assert rows[REFERENCE] == ["4.0", "500.00", "", "16.0", "", "80.00", "", "0.0e+00 of the largest logit"]
    assert rows["half"][:7] == ["2.0", "250.00", "2.00 (2.00-2.00)", "32.0", "2.00 (2.00-2.00)", "80.00", "+0.00"]
    assert rows["int8"][7].endswith("of the logits' spread")
    assert rows["int8 of qat"][0] == "1.0 in memory" and float(rows["int8 of qat"][6]) < 0


def test_a_failure_is_a_row_that_says_why(scripted):
    _, rows = _rows(scripted(half=SideFailed("no such | operator")))
    assert rows["half"] == ["2.0", *["failed: no such / operator", ""] * 2, "", "", ""]
    _, rows = _rows(scripted(**{REFERENCE.replace(" ", "_"): SideFailed("no torch")}))
    assert rows[REFERENCE][1:3] == ["failed: no torch"] * 2
    assert rows["half"][1:3] == ["250.00", "32.0"]  # there are no columns of ratios


def _cells(table):
    return [[cell.strip() for cell in line.split("|")] for line in table.splitlines() if line.startswith("| ")]


# --- whole runs ---


@pytest.mark.slow
def test_a_small_run_of_a_model_and_its_qat_run(tmp_path, pictures, weights, here, capsys, monkeypatch):
    for package in ("onnx", "onnxruntime", "onnxscript", "qwix"):
        pytest.importorskip(package)
    calibration = []
    monkeypatch.setattr(
        "benchmarks.deploy.forms.quantize_static", lambda *args: (calibration.append(args[2]), quantize_static(*args))
    )
    run = _run_folder(tmp_path / "run", weights, dataset=pictures)
    qat = _run_folder(tmp_path / "qat", weights, dataset=pictures, qat="int8")
    assert main(["--runs", run, qat, "--repeats", "1", "--json", str(tmp_path / "deploy.json")]) == 0, (
        capsys.readouterr().out
    )
    written = json.loads((tmp_path / "deploy.json").read_text())
    single, result = written["results"]
    assert (single["batch_size"], result["batch_size"]) == BATCHES
    assert written["machine"]["cpu"] and {"torch", "onnxruntime", "jax", "qwix"} <= written["software"].keys()
    assert (result["run"], result["qat_run"]) == (run, qat)
    assert (result["images"], result["calibration_images"]) == (9, 12)

    # blue tells the training images from those held out
    blue = (np.array([40, 200], np.float32) / 255 - 0.406) / 0.225
    assert len(calibration) == 2
    for images in calibration:
        np.testing.assert_allclose(images[:, 2], np.full_like(images[:, 2], blue[0]), rtol=1e-5)

    assert evaluate([f"--weights={run}", f"--dataset={pictures}", f"--output={tmp_path / 'evaluation'}"]) == 0
    expected = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())["top1"]
    forms = result["sides"]
    assert len(forms) == 9 and forms[REFERENCE]["top1"] == pytest.approx(expected)
    assert forms["ONNX float32"]["top1"] == forms["StableHLO float32"]["top1"] == forms[REFERENCE]["top1"]
    sizes = {name: form["bytes"] for name, form in forms.items()}
    assert sizes["ONNX float16"] < sizes["ONNX float32"]
    assert sizes["QAT int8, qwix in JAX"] < sizes[REFERENCE]
    assert forms["ONNX float32"]["percent_of_onnx_float32"] == 100
    for form in (*forms.values(), *single["sides"].values()):
        assert form["failure"] is None and 0 <= form["difference"] <= form["bound"]
    out = capsys.readouterr().out
    assert f"{run}; top-1 on 9 of 9 held-out images (val)" in out and len(_cells(out)) == 2 + 9


def test_unreadable_images_are_named_and_not_counted(tmp_path, pictures, weights, here, capsys, monkeypatch):
    monkeypatch.setattr(
        "benchmarks.deploy.measure.float_forms", lambda weights, folder, *_: {REFERENCE: _saved(weights, folder)}
    )
    broken = tmp_path / "pictures" / "val" / "b" / "1.png"
    broken.write_bytes(b"broken")
    file = tmp_path / "deploy.json"
    assert main(["--runs", str(weights), "--dataset", pictures, "--repeats", "1", "--json", str(file)]) == 0
    assert str(broken) in capsys.readouterr().err
    _, result = json.loads(file.read_text())["results"]
    assert (result["images"], result["unreadable_images"]) == (8, 1)


def _saved(weights, folder):
    file = save(weights.tensors, weights.config, folder / "float32.safetensors")
    return Form(runs_in="torch", file=str(file), bytes=1, dtype="float32")
