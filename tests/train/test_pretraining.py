"""Whole runs of pre-training without labels, and what can be made of their weights."""

import dataclasses
import shutil
from collections import namedtuple

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from convert import digits, load_flax, load_weights
from convert.__main__ import main as convert
from convert.errors import SettingsError
from crossvit_jax.config import VARIANTS
from tests.command_line import printed_by, refusal
from tests.small_model import shrink, small_config
from tests.train.small_weights import save_small
from train.evaluate import main as evaluate
from train.flags import parse_flags
from train.images.transforms import EvalTransform, Masking
from train.job import prepare
from train.main import main
from train.optim.state import abstract_model
from train.recipes import RECIPES
from train.run.metrics_log import read_metrics
from train.tasks.begin import starting_model
from train.tasks.pretraining.scores import nearest_classes
from train.tasks.pretraining.simmim import Simmim
from train.tasks.task import choosing_metric

Run = namedtuple("Run", "folder flags out")
_FLAGS = ["--task=pretraining", "--image-size=48", "--mask-ratio=0.5", "--epochs=3", "--warmup-epochs=0", "--seed=3"]
_FLAGS += ["--batch-size=24", "--workers=0", "--log-every=1"]


@pytest.fixture(scope="module", autouse=True)
def small():
    """A small variant, few digits, and no curves."""
    rows = digits._stored()[:100]
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch.setitem)
        patch.setattr(digits, "_stored", lambda: rows)
        patch.setattr("train.loop.draw_curves", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three epochs of three steps on digits of 48 pixels."""
    folder = tmp_path_factory.mktemp("pretraining") / "run"
    flags = [*_FLAGS, "--ema-decay=0.5", f"--output={folder}"]
    return Run(folder, flags, printed_by(main, *flags))


def _size(path):
    with Image.open(path) as picture:
        return picture.size


def test_a_run_leaves_metrics_pictures_and_the_weights_of_a_crossvit_without_a_head(run):
    assert "without labels (simmim, 2 of 4 cells masked)" in run.out
    evaluations = [line for line in read_metrics(run.folder) if "eval/loss" in line]
    assert [line["epoch"] for line in evaluations] == [1, 2, 3]
    for line in evaluations:
        assert 0 < line["eval/knn"] <= 100 and 0 < line["eval/ema_knn"] <= 100 and line["eval/loss"] > 0
    assert evaluations[-1]["eval/loss"] < evaluations[0]["eval/loss"]
    assert "(best k-NN accuracy" in run.out
    side = 6 * 48 + 8  # of an enlarged picture, and the gap beside it
    width, height = _size(run.folder / "predictions.png")
    assert width == 4 * side + 8 and height > 12 * side  # of each image itself, what is left, and both branches
    assert _size(run.folder / "train_batch.png")[0] == 4 * side + 8


def test_every_form_of_the_result_is_a_source_without_what_only_pretraining_needs(run):
    rest = "decoder, mask_token_0, mask_token_1"
    sources = [run.folder, f"{run.folder}:last", f"{run.folder}:ema", run.folder / "weights.safetensors"]
    sources += [run.folder / "checkpoints" / "9"]
    for source in sources:
        weights = load_weights(source)
        assert weights.config.num_classes == 0 and weights.config.image_size == (48, 48)
        assert "cls_token_0" in weights.tensors and not any("decoder" in name for name in weights.tensors)
        if not str(source).endswith("9"):
            assert any(f"left out of it: {rest}" in str(note) for note in (*weights.notes, weights.origin))
    last = load_weights(f"{run.folder}:last").tensors
    for name, array in load_weights(run.folder / "checkpoints" / "9").tensors.items():
        np.testing.assert_array_equal(array, last[name])
    assert load_flax(run.folder, num_classes=7).head[0].kernel.shape == (12, 7)

    config = dataclasses.replace(RECIPES["digits"], init=str(run.folder))
    model, weights = starting_model(config, tuple("0123456789"), None, starts_anew=True)
    assert model.num_classes == 10 and weights.tensors["head.0.weight"].shape == (10, 12)


def test_a_run_that_has_not_come_to_its_end_is_a_source_too(run, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(run.folder, again)
    for file in again.glob("weights*"):
        file.unlink()
    weights, last = load_weights(again), load_weights(f"{run.folder}:last")
    assert weights.notes[-1] == "left out of it: decoder, mask_token_0, mask_token_1"
    for name, array in last.tensors.items():
        np.testing.assert_array_equal(weights.tensors[name], array)


def test_a_run_that_goes_on_ends_with_the_same_bits(run, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(run.folder, again)
    shutil.rmtree(again / "checkpoints" / "9")
    for file in again.glob("weights*"):
        file.unlink()
    assert "continued after step 6 of 9" in printed_by(main, *run.flags, f"--output={again}")
    assert read_metrics(again) == read_metrics(run.folder)
    for name in ("weights.safetensors", "weights-ema.safetensors"):
        one, other = (load_file(folder / name) for folder in (run.folder, again))
        assert one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


def test_the_last_fusion_which_no_prediction_depends_on_stays_as_it_was(run):
    config = small_config(0)
    unused = [name for name in load_weights(run.folder).tensors if name.startswith(f"blocks.{config.stages - 1}.")]
    unused = [name for name in unused if not name.startswith(f"blocks.{config.stages - 1}.blocks.")]
    first, last = (load_weights(run.folder / "checkpoints" / step).tensors for step in ("6", "9"))
    assert unused and all(np.array_equal(first[name], last[name]) for name in unused)
    assert not np.array_equal(first["norm.0.weight"], last["norm.0.weight"])


def test_a_flat_folder_of_pictures_suffices_and_the_loss_chooses_the_best(tmp_path):
    for index, pixels in enumerate(load_digits().images[:150]):
        Image.fromarray((pixels * 15).astype(np.uint8)).save(_made(tmp_path / "pictures") / f"{index}.png")
    flags = ["--recipe=pretraining-digits", f"--dataset=folder:{tmp_path / 'pictures'}"]
    job = prepare(parse_flags([*_FLAGS, *flags]))
    assert (len(job.image_sets.train), len(job.image_sets.held_out)) == (135, 15)
    assert job.image_sets.held_out_split == "10% of the pictures"
    task = job.task
    assert task.metrics == () and choosing_metric(task.metrics).name == "loss"
    shapes = task.batch_shapes(5, training=False)
    shapes["image"] = jax.ShapeDtypeStruct(shapes["image"].shape, np.float32)
    outputs = nnx.eval_shape(task.evaluate, abstract_model(task, job.config), shapes)
    assert "features" not in outputs
    scores = task.scores(job.image_sets.held_out)
    for distance in (6.0, 12.0):  # of two batches with an unreadable image each
        sums = {"distance": np.array([distance, 0.0]), "pixels": np.array([1, 0])}
        scores.add({"mask": np.array([1, 0]), "label": np.zeros(2, int), "sums": sums})
    assert scores.values() == {"images": 2, "loss": pytest.approx(18 / 2 / 3, rel=1e-4)}


def _made(folder):
    folder.mkdir(exist_ok=True)
    return folder


def test_a_run_starts_from_a_classifier_and_says_what_is_new(tmp_path):
    source = save_small(tmp_path / "w.safetensors", "abc")
    config = dataclasses.replace(RECIPES["pretraining-digits"], init=str(source), image_size=48)
    model, weights = starting_model(config, (), None, starts_anew=True)
    assert model.num_classes == 0
    assert any("new for pre-training: decoder, mask_token_0, mask_token_1" in note for note in weights.notes)
    stored = load_weights(source).tensors
    for name, array in weights.tensors.items():
        if name.startswith("body."):
            np.testing.assert_array_equal(array, stored[name.removeprefix("body.")])
    assert weights.tensors["decoder.1.weight"].shape == (16 * 16 * 3, 24)


def test_masks_follow_from_seed_and_sample_alone(photo):
    masking = Masking(EvalTransform((48, 48), 1.0), (4, 4), 10, seed=5)
    sample = {"image": photo, "label": 2, "name": "one"}
    first, moved = masking(sample), masking({**sample, "name": "elsewhere"})
    assert first["cells"].sum() == 10 and first["label"] == 2
    np.testing.assert_array_equal(first["cells"], moved["cells"])
    others = [dataclasses.replace(masking, seed=seed)(sample)["cells"] for seed in range(5)]
    assert any((cells != first["cells"]).any() for cells in others)
    assert masking.blank()["cells"].shape == (4, 4) and not masking.blank()["cells"].any()
    task = Simmim(RECIPES["pretraining-digits"], VARIANTS["ti"].replace(image_size=96, image_scale=(1, 2 / 3)), ())
    transform = task.transform(training=True)
    drawn = [transform(sample, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert drawn[0].keys() == task.batch_shapes(1, training=True).keys()
    np.testing.assert_array_equal(drawn[0]["cells"], drawn[1]["cells"])
    np.testing.assert_array_equal(drawn[0]["image"], drawn[1]["image"])
    assert (drawn[0]["cells"] != drawn[2]["cells"]).any()


def test_neighbours_vote_as_scikit_learn_has_them():
    rng = np.random.default_rng(0)
    features, labels, queries = rng.normal(size=(60, 5)), rng.integers(0, 3, 60), rng.normal(size=(40, 5))
    unit, asked = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (features, queries))

    def weights(distances):  # Euclidean: the cosine of unit vectors is 1 - d² / 2
        return np.exp(-(distances**2) / 2 / 0.07)

    reference = KNeighborsClassifier(20, weights=weights).fit(unit, labels)
    np.testing.assert_array_equal(nearest_classes(features, labels, 3, queries), reference.predict(asked))
    alone = [
        KNeighborsClassifier(20, weights=weights)
        .fit(np.delete(unit, i, 0), np.delete(labels, i))
        .predict(unit[i : i + 1])
        for i in range(60)
    ]
    np.testing.assert_array_equal(nearest_classes(features, labels, 3), np.concatenate(alone))
    few = nearest_classes(features[:3], np.array([0, 1, 1]), 2)  # fewer others than are asked for
    assert few.shape == (3,)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--mask-cell=20"], "mask_cell: cells of 20 pixels do not fill an image of 48 x 48 pixels"),
        (["--mask-cell=12"], "mask_cell: cells of 12 pixels are smaller than the patches of branch 1"),
        (["--mask-ratio=0.9"], "mask_ratio: a share of 0.9 masks all of the 4 cells"),
        (["--mask-ratio=0"], "mask_ratio: a share of 0 masks none of the 4 cells"),
        (["--batch-size=200"], "batch_size 200 is more than the 80 training images"),
        (["--mixup=0.8"], "mixup is no setting of pretraining; got 0.8"),
        (["--auto-augment=rand-m9-mstd0.5-inc1"], "auto_augment is no setting of pretraining"),
        (["--erase-prob=0.2"], "erase_prob is no setting of pretraining; got 0.2"),
        (["--distill=x"], "distill is no setting of pretraining; got x"),
        (["--reduce-tokens=merge:1"], "reduce_tokens is no setting of pretraining; got merge:1"),
        (["--freeze-backbone"], "freeze_backbone is no setting of pretraining; got True"),
        (["--class-order=natural"], "class_order is no setting of pretraining; got natural"),
        (["--decoder=mask"], "decoder is no setting of pretraining; got mask"),
        (["--method=none"], "pretraining needs a method; got none"),
        (["--method=mae"], "method must be simmim or dino; got mae"),
        (["--task=classification", "--method=simmim"], "method is no setting of classification; got simmim"),
        (["--task=detection", "--mask-ratio=0.5"], "mask_ratio is no setting of detection; got 0.5"),
        (["--dataset=folder:missing", "--recipe=pretraining-digits"], "there is no folder missing"),
    ],
)
def test_settings_that_make_no_run_are_refused_in_a_line(flags, message, tmp_path, capsys):
    folder = tmp_path / "run"
    base = ["--task=pretraining", "--image-size=48", "--mask-ratio=0.5"] * (not flags[0].startswith("--task"))
    assert message in refusal(capsys, "python -m train.main", main, *base, *flags, f"--output={folder}")
    assert not folder.exists()


def test_a_run_is_not_continued_as_another_task_and_its_weights_classify_nothing(run, capsys, tmp_path):
    message = refusal(capsys, "python -m train.main", main, f"--output={run.folder}")
    assert f"the run in {run.folder} learns pretraining, not classification: name a new folder" in message
    message = refusal(capsys, "python -m train.main", main, *run.flags, "--mask-ratio=0.3")
    assert "mask_ratio was 0.5 and is 0.3" in message
    message = refusal(capsys, "python -m convert", convert, run.folder, tmp_path / "new.pth.tar", "--training")
    assert "learns pretraining, which timm does not: convert its weights alone" in message
    message = refusal(capsys, "python -m train.evaluate", evaluate, f"--weights={run.folder}")
    assert "has no head: it gives features, not classes" in message
    state = tmp_path / "last.pth.tar"
    state.write_bytes(b"no checkpoint")
    with pytest.raises(SettingsError, match="cannot go on as pretraining"):
        starting_model(
            dataclasses.replace(RECIPES["pretraining-digits"], resume=str(state)),
            (),
            None,
            starts_anew=True,
            carried=load_weights(run.folder),
        )
