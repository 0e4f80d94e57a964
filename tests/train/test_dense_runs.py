"""Whole runs of detection and segmentation, and what the commands make of their weights."""

import csv
import io
import json
import shutil
from collections import namedtuple

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import train.compile
import train.evaluate
import train.predict
from convert import load_weights
from convert.__main__ import main as convert
from convert.errors import SettingsError
from tests.command_line import printed_by, refusal
from tests.small_model import shrink
from tests.train.small_weights import save_small
from train.data.dense import scenes
from train.inference.model import load_classifier_weights
from train.main import main
from train.run.metrics_log import read_metrics

Run = namedtuple("Run", "kind folder flags out")
_KINDS = {"detection": ("ap", ["--num-convs=1"]), "segmentation": ("miou", [])}


@pytest.fixture(scope="module", autouse=True)
def small():
    """A small variant, few scenes, and no curves."""
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch.setitem)
        patch.setattr(scenes, "TRAIN_SCENES", 32)
        patch.setattr(scenes, "HELD_OUT_SCENES", 6)
        patch.setattr("train.loop.draw_curves", lambda *_: None)
        yield


@pytest.fixture(scope="module", params=_KINDS)
def run(request, tmp_path_factory):
    """A run of three epochs of two steps on scenes of 48 pixels."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    flags = [f"--task={request.param}", "--image-size=48", "--width=32", "--epochs=3", "--warmup-epochs=0", "--seed=3"]
    flags += ["--batch-size=16", "--workers=0", "--log-every=1", "--ema-decay=0.5", f"--output={folder}"]
    flags += _KINDS[request.param][1]
    return Run(request.param, folder, flags, printed_by(main, *flags))


def _size(path):
    with Image.open(path) as picture:
        return picture.size


def test_a_run_leaves_metrics_weights_and_pictures_and_keeps_the_best(run):
    name = _KINDS[run.kind][0]
    for picture in ("train_batch.png", "predictions.png"):
        assert min(_size(run.folder / picture)) > 200
    evaluations = [line for line in read_metrics(run.folder) if "eval/loss" in line]
    assert [line["epoch"] for line in evaluations] == [1, 2, 3]
    names = {"detection": ("ap", "ap50", "ap75", "ar100"), "segmentation": ("miou", "macc", "aacc")}[run.kind]
    for line in evaluations:
        for key in names:
            assert 0 <= line[f"eval/{key}"] <= 1 and 0 <= line[f"eval/ema_{key}"] <= 1
    best = max(line[f"eval/{which}{name}"] for line in evaluations for which in ("", "ema_"))
    label = {"ap": "AP", "miou": "mIoU"}[name]
    assert f"(best {label} {best:.2f}" in run.out
    weights = load_weights(run.folder)
    assert f"held-out {label} {best:.2f}" in weights.notes[0]
    assert weights.config.task == run.kind and weights.config.num_classes == len(weights.class_names)
    losses = [line["train/loss"] for line in read_metrics(run.folder) if "train/loss" in line]
    assert len(losses) == 6 and np.isfinite(losses).all()


def test_a_run_that_goes_on_ends_with_the_same_bits(run, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(run.folder, again)
    shutil.rmtree(again / "checkpoints" / "6")
    for file in again.glob("weights*"):
        file.unlink()
    assert "continued after step 4 of 6" in printed_by(main, *run.flags, f"--output={again}")
    assert read_metrics(again) == read_metrics(run.folder)
    for name in ("weights.safetensors", "weights-ema.safetensors"):
        one, other = (load_file(folder / name) for folder in (run.folder, again))
        assert one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


def _refused(capsys, program, command, *flags):
    return refusal(capsys, f"python -m train.{program}", command, *flags)


def test_another_variant_or_task_is_no_continuation(run, capsys):
    message = _refused(capsys, "main", main, *run.flags, "--variant=s")
    assert "cannot be continued with other settings" in message and "variant was 'ti' and is 's'" in message
    other = next(kind for kind in _KINDS if kind != run.kind)
    message = _refused(capsys, "main", main, f"--task={other}", f"--output={run.folder}")
    assert f"the run in {run.folder} learns {run.kind}, not {other}: name a new folder" in message
    message = _refused(capsys, "main", main, f"--output={run.folder}")
    assert f"learns {run.kind}, not classification" in message


def test_evaluation_repeats_the_figures_of_the_run_and_writes_them(run, tmp_path, capsys):
    folder = tmp_path / "evaluation"
    assert train.evaluate.main([f"--weights={run.folder}:last", f"--output={folder}", "--batch-size=4"]) == 0
    out = capsys.readouterr().out
    numbers = json.loads((folder / "evaluation.json").read_text())
    last = read_metrics(run.folder)[-1]
    for name, value in last.items():
        if name.startswith("eval/") and not name.startswith("eval/ema_"):
            assert numbers[name.removeprefix("eval/")] == pytest.approx(value, abs=2e-5), name
    names = {"detection": {"detections.json", "precision.png"}, "segmentation": {"confusion.csv", "confusion.png"}}
    assert {path.name for path in folder.iterdir()} == {"evaluation.json", "per_class.csv", *names[run.kind]}
    if run.kind == "detection":
        assert out.count("Average Precision") == out.count("Average Recall") == 6
    else:
        assert "background  " in out and "IoU  accuracy" in out
    assert "images        6 (unreadable: 0)\n" in out
    assert "digits: 6 images (validation)" in out


def test_the_weights_of_another_task_are_refused_in_a_line(run, tmp_path, capsys):
    classifier = save_small(tmp_path / "w.safetensors", "abc")
    shutil.copy(run.folder / "config.json", tmp_path)  # as if it were of this run
    message = _refused(capsys, "evaluate", train.evaluate.main, f"--weights={classifier}")
    assert f"the run in {tmp_path} learns {run.kind}, and the weights are for classification" in message
    for flag, name in (("--crop-pct=0.9", "crop-pct"), ("--class-order=natural", "--class-order")):
        assert name in _refused(capsys, "evaluate", train.evaluate.main, f"--weights={run.folder}", flag)
    with pytest.raises(SettingsError, match=f"is for {run.kind}, and a classifier is needed"):
        load_classifier_weights(str(run.folder))  # as the benchmarks do
    picture = _pictures(tmp_path)[0]
    flags = {"--top-k=2": "top-k", f"--attention={tmp_path / 'a'}": "attention"}
    flags |= {"--masks=" + str(tmp_path / "m"): "masks"} if run.kind == "detection" else {"--classes=1": "classes"}
    flags |= {} if run.kind == "detection" else {"--score-threshold=0.5": "score-threshold"}
    before = set(tmp_path.iterdir())
    for flag, name in flags.items():
        message = _refused(capsys, "predict", train.predict.main, f"--weights={run.folder}", flag, picture)
        assert name in message and run.kind in message
    for flag in ("--classes=1", "--coco=x.json", f"--masks={tmp_path / 'm'}", f"--overlay={tmp_path / 'o'}"):
        message = _refused(capsys, "predict", train.predict.main, f"--weights={classifier}", flag, picture)
        assert "is not for classification" in message
    message = refusal(capsys, "python -m convert", convert, run.folder, tmp_path / "x.pth.tar", "--training")
    assert f"the run in {run.folder} learns {run.kind}, which timm does not" in message
    assert set(tmp_path.iterdir()) == before


def _pictures(folder):
    """A wide scene and a small one."""
    paths = []
    for name, size, index in (("wide.png", (120, 60), 0), ("small.png", (40, 40), 1)):
        encoded = scenes.open_scenes("detection", seed=0).held_out[index]["image"]
        Image.open(io.BytesIO(encoded)).resize(size).save(folder / name)
        paths.append(folder / name)
    return paths


@pytest.fixture
def predict(run, capsys):
    def _predict(*flags):
        status = train.predict.main([f"--weights={run.folder}", *map(str, flags)])
        captured = capsys.readouterr()
        assert status == 0, captured.err
        return captured.out, captured.err

    return _predict


def test_prediction_tells_what_is_in_pictures_at_their_own_sizes(run, predict, tmp_path):
    pictures = _pictures(tmp_path)
    wide, small = map(str, pictures)
    if run.kind == "segmentation":
        out, _ = predict("--format=jsonl", f"--masks={tmp_path / 'm'}", f"--overlay={tmp_path / 'o'}", *pictures)
        lines = [json.loads(line) for line in out.splitlines()]
        for line, (path, size) in zip(lines, ((wide, (120, 60)), (small, (40, 40))), strict=True):
            mask = Image.open(line["mask"])
            assert (line["path"], mask.size, mask.mode) == (path, size, "P")
            assert _size(line["picture"]) == size
            counts = np.bincount(np.asarray(mask).ravel())
            shares = {entry["index"]: entry["share"] for entry in line["classes"]}
            assert shares == pytest.approx(
                {int(i): counts[i] / mask.width / mask.height for i in np.flatnonzero(counts)}
            )
        rows = list(csv.DictReader(io.StringIO(predict("--format=csv", *pictures)[0])))
        assert sum(int(row["pixels"]) for row in rows if row["path"] == small) == 1600
        table = predict(*pictures)[0].splitlines()
        assert table[0].split() == ["image", "class", "pixels"] and " %" in table[1]
        return
    flags = ["--score-threshold=0", "--max-detections=7", "--iou-threshold=0.5"]
    out, error = predict(
        "--format=jsonl", *flags, f"--coco={tmp_path / 'c.json'}", f"--overlay={tmp_path / 'o'}", *pictures
    )
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["path"] for line in lines] == [wide, small]
    for line, (width, height) in zip(lines, ((120, 60), (40, 40)), strict=True):
        scores = [entry["score"] for entry in line["objects"]]
        assert len(scores) == 7 and scores == sorted(scores, reverse=True)
        boxes = np.array([entry["box"] for entry in line["objects"]])
        assert (boxes >= 0).all() and (boxes <= [width, height, width, height]).all()
        assert _size(line["picture"]) == (width, height)
    assert f"14 boxes written to {tmp_path / 'c.json'}" in error
    results = json.loads((tmp_path / "c.json").read_text())
    assert [entry["image_id"] for entry in results] == [1] * 7 + [2] * 7
    x1, y1, x2, y2 = lines[1]["objects"][0]["box"]
    assert results[7]["bbox"] == pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=2e-3)
    assert (results[7]["file_name"], results[7]["category_id"]) == (small, lines[1]["objects"][0]["index"])

    name = lines[0]["objects"][0]["class"]
    rows = list(csv.DictReader(io.StringIO(predict("--format=csv", *flags, f"--classes={name}", *pictures)[0])))
    assert {row["class"] for row in rows} == {name}
    for line in lines:  # objects of other classes take no place among the seven
        wanted = [entry["score"] for entry in line["objects"] if entry["class"] == name]
        scores = [float(row["score"]) for row in rows if row["path"] == line["path"]]
        assert len(wanted) <= len(scores) <= 7 and scores[: len(wanted)] == pytest.approx(wanted, rel=1e-5)
    table = predict("--score-threshold=1", *pictures)[0].splitlines()  # which no score is above
    assert table[0].split() == ["image", "class", "score", "x1", "y1", "x2", "y2"]
    assert [line.split() for line in table[1:]] == [[wide, "nothing"], [small, "nothing"]]


def test_what_prediction_cannot_write_is_told_before_anything_is(run, capsys, tmp_path):
    pictures, out = _pictures(tmp_path), tmp_path / "out"

    def refused(*flags):
        message = _refused(capsys, "predict", train.predict.main, f"--weights={run.folder}", *pictures, *flags)
        assert not out.exists()
        return message

    if run.kind == "segmentation":
        message = refused(f"--masks={out}", f"--overlay={tmp_path}/./out")
        assert "--overlay and --masks name the same folder" in message
        return
    (tmp_path / "c.json").write_text("mine")
    assert "c.json" in refused(f"--overlay={out}", f"--coco={tmp_path / 'c.json'}")
    assert "--classes: no class 'cat'; there are 0, 1" in refused(f"--overlay={out}", "--classes", "cat")
    assert (tmp_path / "c.json").read_text() == "mine"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--task=detection", "--mixup=0.8"], "mixup is no setting of detection; got 0.8"),
        (["--task=detection", "--smoothing=0.1"], "smoothing is no setting of detection; got 0.1"),
        (["--task=segmentation", "--repeated-aug=3"], "repeated_aug is no setting of segmentation; got 3"),
        (["--task=segmentation", "--qat=int8", "--init=x"], "qat is no setting of segmentation; got int8"),
        (["--task=detection", "--loss=bce"], "loss is no setting of detection; got bce"),
        (["--task=detection", "--auto-augment=rand-m9-mstd0.5-inc1"], "auto_augment is no setting of detection"),
        (["--task=detection", "--augment-on=device"], "augment_on device is no setting of detection"),
        (["--task=segmentation", "--class-order=natural"], "class_order is no setting of segmentation; got natural"),
        (["--task=detection", "--crop-pct=0.9"], "crop_pct is no setting of detection; got 0.9"),
        (["--task=detection", "--crop-scale=0.5,1"], "crop_scale is no setting of detection"),
        (["--task=detection", "--dropout=0.1"], "dropout is no setting of detection; got 0.1"),
        (["--task=detection", "--mix-group=4"], "mix_group is no setting of detection; got 4"),
        (["--task=detection", "--dice=1"], "dice is no setting of detection; got 1.0"),
        (["--task=segmentation", "--distances=24"], "distances is no setting of segmentation; got (24.0,)"),
        (["--decoder=mask"], "decoder is no setting of classification; got mask"),
        (["--scale-jitter=0.5,1"], "scale_jitter is no setting of classification; got (0.5, 1.0)"),
        (["--width=64"], "width is no setting of classification; got 64"),
        (["--task=detection", "--distances=48,24"], "distances must be rising numbers above 0; got (48.0, 24.0)"),
        (["--task=segmentation", "--decoder=fcn"], "decoder must be upernet or mask; got fcn"),
        (["--task=detection", "--width=40"], "width must be a multiple of 32; got 40"),
        (["--task=detection", "--variant=x"], "x"),
        (["--task=detection", "--dataset=masks:x"], "--dataset masks:x has masks; for detection: digits, coco:PATH"),
        (["--task=segmentation", "--dataset=coco:x"], "has boxes; for segmentation: digits, masks:PATH"),
        (["--task=detection", "--batch-size=64"], "batch_size 64 is more than the 32 training images"),
    ],
)
def test_settings_that_make_no_run_are_refused_in_a_line(flags, message, tmp_path, capsys):
    folder = tmp_path / "run"
    assert message in _refused(capsys, "main", main, *flags, f"--output={folder}")
    assert not folder.exists()


def test_what_such_steps_cost_is_refused_rather_than_told_of_a_classifier(capsys):
    message = _refused(capsys, "compile", train.compile.main, "--recipe=detection")
    assert "only programs of classification are compiled, not those of detection" in message
