"""The end-to-end benchmark: what it refuses, what it takes for photographs, how rounds begin and end, a small run."""

import dataclasses
import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import data, end_to_end
from benchmarks.end_to_end import as_json, main, require_comparable, write_photographs
from benchmarks.rounds import SidesDisagree, Times
from benchmarks.sides import fed
from benchmarks.sides.fed import Delivered
from benchmarks.table import fed_markdown
from benchmarks.task import PHOTOGRAPH_CLASSES, EndToEndTask, Task
from benchmarks.worker import Ready, Round
from tests.command_line import refusal
from train.data.datasets import open_image_sets


def _task(**changes) -> EndToEndTask:
    step = Task(benchmark="training", variant="ti", batch_size=4, dtype="float32", device="cpu", weights="none")
    return EndToEndTask(**{"step": step, "folder": "none", "workers": 3} | changes)


def _photographs(task) -> tuple[np.ndarray, np.ndarray]:
    """A batch as it should be."""
    shape = (task.step.batch_size, *task.image_size, 3)
    return np.random.default_rng(0).uniform(-2.0, 2.5, shape).astype(np.float32), np.array([0, 3, 9, 3])


def _times(*seconds: float, check=None, failure=None, others: float = 0.0) -> Times:
    return Times(Ready(check, {"jax": "1"}, 1, 1.0, 2.0, 3.0), [Round(s, others) for s in seconds], failure=failure)


# --- what is refused ---


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--repeats 0", "--repeats"),
        ("--workers 0", "--workers"),
        ("--augment-on nowhere", "--augment-on"),
        ("--variants resnet", "unknown CrossViT variant"),
        ("--images 7 --batch-size 8", "--images 7 do not fill a batch of 8"),
        ("--device cpu --flax-step flax-cudnn", "needs a GPU"),
        ("--json /no/such/folder/x.json", "existing folder"),
    ],
)
def test_a_wrong_flag_is_one_line_and_status_2(flags, says, capsys):
    assert says in refusal(capsys, "python -m benchmarks.end_to_end", main, *flags.split())


@pytest.mark.parametrize(
    ("benchmark", "flags", "missing"), [(end_to_end, ["--device", "cpu"], "grain"), (data, [], "simplejpeg")]
)
def test_without_a_package_of_the_pipeline_nothing_is_started_and_one_line_says_which(
    benchmark, flags, missing, monkeypatch, capsys
):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else found(name))
    monkeypatch.setattr(data, "_measure", None)
    monkeypatch.setattr(end_to_end, "write_photographs", None)
    assert benchmark.main(flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"error: the input pipelines need {missing}: pip install -e '.[train]'")


def test_photographs_as_the_model_wants_them_are_accepted():
    task = _task()
    images, labels = _photographs(task)
    images[0, :60, :60] = np.random.default_rng(1).normal(size=(60, 60, 3))  # erased
    assert Delivered.of(images, labels).problem(task) is None


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda images: images[:, :-1], "not float32 of"),
        (lambda images: images.astype(np.float64), "batches are float64"),
        (lambda images: (images + 2) / 4.5, "no photographs"),  # from 0 to 1: not normalised
        (lambda images: images * 50, "no photographs"),  # from 0 to 255
        (lambda images: images * np.nan, "no photographs"),
    ],
)
def test_a_pipeline_that_delivers_anything_else_is_told(spoil, says):
    task = _task()
    images, labels = _photographs(task)
    assert says in Delivered.of(spoil(images), labels).problem(task)
    assert "labels" in Delivered.of(images, labels + PHOTOGRAPH_CLASSES).problem(task)


def test_nothing_is_timed_where_steps_or_pictures_are_wrong():
    task = _task()
    good = Delivered.of(*_photographs(task))

    def sides(loss=7.0, fed=good):
        steps = {side: {"losses": np.array([7.0, own])} for side, own in (("flax", loss), ("timm", 7.0))}
        fed = {"flax-device": fed, "timm-loader": good}
        return {side: _times(check=check) for side, check in (steps | fed).items()}

    require_comparable(task, sides())
    with pytest.raises(SidesDisagree, match="flax's losses differ from timm's"):
        require_comparable(task, sides(loss=7.1))
    with pytest.raises(SidesDisagree, match="flax-device: batches are uint8"):
        require_comparable(task, sides(fed=dataclasses.replace(good, dtype="uint8")))


# --- rounds ---


def test_a_round_begins_with_empty_queues():
    happened = []
    take, train = lambda: happened.append("take"), lambda steps: happened.append(f"train {steps}")
    with fed.steady_state(take, train, ahead=3, workers=2):
        happened.append("round")
    assert happened == ["take", "take", "take", "train 2", "round"]


def test_the_next_turn_begins_when_the_workers_rest(monkeypatch):
    worked = iter([0.0, 0.4, 0.8, 0.81, 2.0])
    monkeypatch.setattr(fed, "children_seconds", lambda: next(worked))
    monkeypatch.setattr(fed.time, "sleep", lambda seconds: None)
    fed.wait_for_rest()
    assert list(worked) == [2.0]


# --- photographs and tables ---


def test_the_photographs_are_a_data_set_of_the_trainer(tmp_path):
    write_photographs(tmp_path, 12)
    sets = open_image_sets(_task(folder=str(tmp_path)).recipe("device"))
    assert len(sets.train) == 12 and len(sets.class_names) == PHOTOGRAPH_CLASSES
    assert sets.train[0]["image"].startswith(b"\xff\xd8")


def test_shares_are_of_the_sides_own_step_and_ratios_of_what_is_fed_alike():
    sides = {"flax": _times(1.0, 1.2, 1.1), "flax-device": _times(1.25, 1.5, 1.375)}
    sides |= {"timm": _times(2.2, 2.2, 2.2), "timm-loader": _times(5.5, 5.5, 5.5)}
    content = json.loads(json.dumps(as_json([(_task(), sides)], images=64)))
    rows = {cells[4]: cells[5:-1] for cells in _rows(fed_markdown(content))}
    assert rows == {
        "flax": ["43.6 (40.0-48.0)", "", "2.00 (1.83-2.20)"],  # 12 steps of 4 images
        "flax-device": ["34.9 (32.0-38.4)", "80 % (80-80)", "4.00 (3.67-4.40)"],
        "timm": ["21.8 (21.8-21.8)", "", ""],
        "timm-loader": ["8.7 (8.7-8.7)", "40 % (40-40)", ""],
    }


def _verdicts(variant: str, *, device: str = "gpu", others: float = 0.0) -> list[str]:
    """Fed steps take 1.25 and 1.1 seconds, alone 1; those of timm 4.5."""
    seconds = {"flax": 1.0, "flax-device": 1.25, "flax-host": 1.1, "timm": 2.0, "timm-loader": 4.5}
    step = dataclasses.replace(_task().step, variant=variant, device=device, dtype="bfloat16")
    sides = {side: _times(value, others=others) for side, value in seconds.items()}
    table = fed_markdown(as_json([(_task(step=step), sides)], images=64))
    return [line for line in table.splitlines() if line.startswith("The goal")]


@pytest.mark.parametrize(
    ("variant", "verdict"),
    [
        ("ti", "The goal, 4.0 times timm's loader, is reached by ti at batch 4 (4.091)."),
        ("s", "The goal, 90% of the step alone, is reached by s at batch 4 (90.9%)."),
        ("b", "The goal, 90% of the step alone, is reached by b at batch 4 (90.9%)."),
    ],
)
def test_on_a_gpu_the_faster_pipeline_is_beside_the_goal_of_its_variant(variant, verdict):
    assert _verdicts(variant) == [verdict]


def test_on_a_cpu_and_on_a_busy_machine_there_is_no_verdict():
    assert _verdicts("ti", device="cpu") == _verdicts("s", others=1e3) == []


def test_a_side_that_failed_is_a_row_that_says_why():
    sides = {"flax": _times(1.0), "flax-device": _times(failure="no | grain")}
    sides |= {"timm": _times(2.0), "timm-loader": _times(3.0)}
    rows = {cells[4]: cells[5:-1] for cells in _rows(fed_markdown(as_json([(_task(), sides)], images=64)))}
    assert rows["flax-device"] == ["failed: no / grain", "", ""]
    assert rows["flax"][2] == "2.00 (2.00-2.00)"


def _rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")] for line in table.splitlines() if line.startswith("| ti |")]


# --- a whole run ---


@pytest.mark.slow
def test_a_small_run(tmp_path):
    """Every process is a real one; nothing is left behind, neither processes nor shared memory."""
    path = tmp_path / "result.json"
    flags = "--device cpu --batch-size 2 --images 16 --workers 1 --augment-on device --repeats 1 --json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.small_end_to_end", *flags.split(), str(path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "leaked" not in done.stderr and "Traceback" not in done.stderr
    written = json.loads(path.read_text())
    assert written["benchmark"] == "end_to_end" and (written["images"], written["workers"]) == (16, 1)
    (result,) = written["results"]
    assert list(result["sides"]) == ["flax", "flax-device", "timm", "timm-loader"]
    assert all(side["failure"] is None and len(side["rounds_s_per_call"]) == 1 for side in result["sides"].values())
    assert len(_rows(done.stdout)) == 4 and done.stdout.strip() == fed_markdown(written).strip()
