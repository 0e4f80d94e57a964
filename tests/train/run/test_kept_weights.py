"""Which of the weights that a run keeps are meant by its folder, `:last` and `:ema`, and that this is said."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from jax import tree

import convert
from convert import ConversionError, load_weights
from convert.formats.run_folder import choose
from convert.metadata import describe
from convert.tree import nest
from tests.small_model import small_config
from tests.train.small_weights import small_timm_model
from train.run.checkpoints import Checkpoints
from train.run.folder import run_behind
from train.run.run_state import Best, RunState
from train.tasks.detection import Detection
from train.tasks.segmentation import Segmentation
from train.tasks.task import choosing_metric

_NAMES = tuple("abc")


def _tensors(value):
    """The weights of the small model, each of them raised by a number that tells which they are."""
    return {name: tensor.numpy() + np.float32(value) for name, tensor in small_timm_model(3).state_dict().items()}


def _value(source):
    weights = load_weights(source)
    assert weights.class_names == _NAMES
    return round(float(np.mean(weights.tensors["cls_token_0"] - _tensors(0)["cls_token_0"]))), weights.notes


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The folder of a run with checkpoints after the steps 10, 20 and 30, of which 20 was the best, by its average."""
    folder = tmp_path_factory.mktemp("runs") / "x"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"train": {}}))
    checkpoints = Checkpoints(folder, description=describe(small_config(3), _NAMES), say=print)
    checkpoints.best_step = 10
    for step in (10, 20, 30):
        params, ema = (tree.map(jnp.asarray, nest(_tensors(value))) for value in (step, step + 1))
        checkpoints.save({"params": params, "ema": ema}, RunState(step), {})
    checkpoints.wait()
    checkpoints.close()
    scores = {10: (50.0, 50.0), 20: (40.0, 60.0), 30: (55.0, 54.0)}
    lines = [
        {"step": step, "epoch": step // 10, "eval/top1": raw, "eval/ema_top1": average}
        for step, (raw, average) in scores.items()
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def _save(path, value, origin=None):
    convert.save(_tensors(value), small_config(3), path, class_names=_NAMES, origin=origin)


def test_of_a_run_on_its_way_the_newest_checkpoint_is_taken(kept):
    begun = "the run has not come to its end: taken is "
    assert _value(kept) == (30, (f"{begun}the model of the newest checkpoint, step 30",))
    assert _value(f"{kept}:last") == _value(kept)
    assert _value(f"{kept}:ema") == (31, (f"{begun}the average of the weights of the newest checkpoint, step 30",))


def test_of_a_run_that_has_ended_the_weights_of_the_best_evaluation_are_taken(kept, tmp_path):
    run = shutil.copytree(kept, tmp_path / "x")
    _save(run / "weights.safetensors", 1)
    # as an earlier version left it
    told = "taken is the average of the weights of the best checkpoint, epoch 2, top-1 60.00 %"
    assert _value(run) == (21, (told,))
    (run / "metrics.jsonl").unlink()
    assert _value(run) == (1, ("weights.safetensors was taken",))
    _save(run / "weights-best.safetensors", 2, origin="the weights after epoch 1, held-out top-1 70.00 %")
    told = "weights-best.safetensors was taken, not weights.safetensors: "
    assert _value(run) == (2, (f"{told}the weights after epoch 1, held-out top-1 70.00 %",))
    assert _value(f"{run}:last") == (1, ("weights.safetensors was taken, not weights-best.safetensors",))
    _save(run / "weights-ema.safetensors", 3)
    others = "weights-best.safetensors or weights.safetensors"
    assert _value(f"{run}:ema") == (3, (f"weights-ema.safetensors was taken, not {others}",))
    assert _value(run / "weights.safetensors") == (1, ())


@pytest.mark.parametrize(
    ("task", "told"), [("detection", "step 20 epoch 2 AP 0.600"), ("segmentation", "step 20 epoch 2 mIoU 0.600")]
)
def test_the_metric_of_a_runs_own_task_chooses_its_best_checkpoint(tmp_path, task, told):
    metric = choosing_metric({"detection": Detection.metrics, "segmentation": Segmentation.metrics}[task])
    assert metric.better == "max"
    (tmp_path / "config.json").write_text(json.dumps({"train": {"task": task}}))
    lines = [
        {"step": step, "epoch": step // 10, f"eval/{metric.name}": value, "eval/top1": 100 - step}
        for step, value in ((10, 0.5), (20, 0.6), (30, 0.55))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "weights.safetensors").touch()
    for step in (10, 20, 30):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    choice = choose(tmp_path, None)
    assert f"step {choice.path.name} {choice.note.partition('best checkpoint, ')[2].replace(',', '')}" == told


def test_what_a_run_does_not_keep_is_told(tmp_path):
    with pytest.raises(ConversionError, match="is not the folder of a run, which alone has :ema"):
        load_weights(f"{tmp_path}:ema")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConversionError, match="keeps no weights yet"):
        load_weights(tmp_path)
    _save(tmp_path / "weights.safetensors", 1)
    with pytest.raises(ConversionError, match="keeps no average of the weights"):
        load_weights(f"{tmp_path}:ema")


def test_the_run_behind_weights_is_found(kept, tmp_path, monkeypatch):
    for source in ("", ":last", ":ema", "/weights.safetensors", "/checkpoints", "/checkpoints/20"):
        assert run_behind(f"{kept}{source}") == run_behind(f"local-dir:{kept}{source}") == str(kept)
    assert run_behind(str(tmp_path / "w.safetensors")) is None
    assert run_behind(f"{kept}/other/x/w.safetensors") is None
    monkeypatch.chdir(kept)
    assert run_behind("hf-hub:timm/crossvit_tiny_240.in1k") is None
    assert run_behind("weights.safetensors") == "."


def test_the_best_evaluation_of_earlier_versions_is_understood():
    old = {"step": 4, "log_bytes": 0, "meter": None, "best": {"top1": 50.0, "epoch": 1, "step": 2}}
    assert RunState.from_json(old).best == Best(50.0, 1, 2)
    new = RunState(4, best=Best(50.0, 1, 2, "ema"), lr=0.1)
    assert RunState.from_json(new.to_json()) == new
