"""The benchmark commands: what they refuse, how they search and compare, and a whole small run."""

import json
import math
import time
from dataclasses import dataclass, field

import numpy as np
import pytest

from benchmarks import rounds as measure
from benchmarks import worker
from benchmarks.command import main
from benchmarks.model_flops import flops_per_image
from benchmarks.model_table import multiply_adds, parameters
from benchmarks.result import as_json
from benchmarks.rounds import Measured, SidesDisagree, Times
from benchmarks.table import table_lines
from benchmarks.task import SIDES, Program, Task, default_sides
from benchmarks.worker import Ready, Round, SideFailed
from crossvit_jax.config import get_config
from tests.benchmarks.brief import BriefTask
from tests.train.runner import QUICK_COMPILATION


def _task(**changes) -> Task:
    settings = {"benchmark": "inference", "variant": "ti", "batch_size": 4, "dtype": "float32", "device": "cpu"}
    return Task(**settings | {"weights": "none"} | changes)


class _FakeWorker:
    """A side that answers at once; `script` has what each one gives as logits, or that it fails."""

    script: dict = {}  # noqa: RUF012 (set by each test)
    log: list = []  # noqa: RUF012

    def __init__(self, side, task, environment, *, patience):
        self.side, self.task = side, task
        self.log.append(f"started {side}")

    def __enter__(self):
        self.log.append(f"+{self.side}")
        return self

    def __exit__(self, *_):
        self.log.append(f"-{self.side}")

    @property
    def loaded(self):
        answer = self.script.get(self.side, 1.0)
        if isinstance(answer, SideFailed):
            raise answer
        return answer

    @property
    def ready(self):
        answer = self.loaded
        self.log.append(f"warm {self.side}")
        if not isinstance(answer, dict):
            answer = {"logits": np.array([answer, 2.0])}
        exact = {name: values * 1.01 for name, values in answer.items()} if self.side == "timm" else None
        return Ready(answer, {}, 1, 0.0, 0.0, 0.0, float32=exact if self.task.dtype == "bfloat16" else None)

    def round(self):
        self.log.append(self.side)
        return Round(1.0, 0.0)


@pytest.fixture
def workers(monkeypatch):
    monkeypatch.setattr(measure, "Worker", _FakeWorker)
    monkeypatch.setattr(_FakeWorker, "script", {})
    monkeypatch.setattr(_FakeWorker, "log", [])
    return _FakeWorker


_STEPS = {"losses": np.array([6.9, 6.5]), "gradients": np.array([0.5, 2e-2, 4e-5, 1e-11])}  # the last: a key bias


def _steps(**changes) -> dict[str, np.ndarray]:
    return _STEPS | {name: np.array(values) for name, values in changes.items()}


def _measure(keep=True, **changes):
    sides = ["flax", "timm", "timm-compile"]
    return measure.measure(_task(**changes), sides, rounds=2, keep=keep, environment={}, say=lambda _: None)


@pytest.mark.parametrize(
    ("benchmark", "flags", "says"),
    [
        ("inference", "--batch-size 0", "--batch-size"),
        ("inference", "--variant resnet", "unknown CrossViT variant"),
        ("inference", "--find-largest-batch --device cpu", "--find-largest-batch needs a GPU"),
        ("inference", "--sides flax flax --device cpu", "twice"),
        ("inference", "--json /no/such/folder/x.json --device cpu", "existing folder"),
        ("inference", "--repeat 3", "unrecognized arguments"),
    ],
)
def test_a_wrong_flag_is_one_line_and_status_2(benchmark, flags, says, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(benchmark, flags.split())
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_the_sides_take_turns(workers):
    _measure()
    assert [entry for entry in workers.log if entry in SIDES] == ["flax", "timm", "timm-compile"] * 2


@pytest.mark.parametrize(("until", "rounds"), [(None, 4), (14.0, 4), (13.9, 3), (10.0, 2), (1.0, 1)])
def test_no_round_is_begun_that_would_end_too_late_but_the_first(workers, monkeypatch, until, rounds):
    """Each of the three sides takes a second, and the first round begins after two."""
    monkeypatch.setattr(measure.time, "monotonic", lambda: 2.0 + sum(entry in SIDES for entry in workers.log))
    sides = {side: Times() for side in ("flax", "timm", "timm-compile")}
    told = []
    measure.take_turns(_task(), sides, compare=lambda: None, rounds=4, until=until, environment={}, say=told.append)
    assert [len(times.rounds) for times in sides.values()] == [rounds] * 3
    assert ("no time for more" in told[-1]) == (rounds < 4)


def test_on_a_cpu_a_side_is_warm_before_the_next_one_starts(workers):
    _measure()
    first_round = workers.log.index("flax")
    assert [entry for entry in workers.log[:first_round] if " " in entry] == [
        *("started flax", "warm flax", "started timm", "warm timm", "started timm-compile", "warm timm-compile")
    ]


def test_on_a_gpu_all_load_at_once_and_warm_up_one_by_one(workers):
    workers.script = {"flax": SideFailed("no memory")}
    measured = _measure(device="gpu")
    first_round = workers.log.index("timm")
    assert [entry for entry in workers.log[:first_round] if " " in entry] == [
        *("started flax", "started timm", "started timm-compile", "warm timm", "warm timm-compile")
    ]
    assert measured.sides["flax"].failure == "no memory"


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_at_the_largest_batch_no_two_processes_live_at_once(workers, device):
    _measure(keep=False, device=device)
    alive = 0
    for entry in workers.log:
        alive += {"+": 1, "-": -1}.get(entry[0], 0)
        assert alive <= 1
    assert alive == 0


@pytest.mark.parametrize(("dtype", "logit"), [("float32", 1.001), ("bfloat16", 1.3), ("float32", math.nan)])
def test_models_that_disagree_are_not_timed(workers, dtype, logit):
    workers.script = {"flax": logit}
    with pytest.raises(SidesDisagree, match=r"^flax's logits differ from timm's"):
        _measure(dtype=dtype)
    assert not set(SIDES) & set(workers.log)


@pytest.mark.parametrize(
    ("dtype", "changes", "what"),
    [
        ("float32", {"losses": [6.9, 6.5002]}, "losses"),
        ("bfloat16", {"losses": [6.9, 6.55]}, "losses"),
        ("float32", {"gradients": [0.5, 2e-2, 0, 0]}, "gradients"),  # the smallest one that is no rounding is missing
        ("bfloat16", {"gradients": [0.5, 2e-2, 0, 0]}, "gradients"),
        ("bfloat16", {"gradients": [0.5, 4e-2, 4e-5, 0]}, "gradients"),
        ("bfloat16", {"gradients": [math.nan, 2e-2, 4e-5, 0]}, "gradients"),
    ],
)
def test_training_steps_that_disagree_are_not_timed(workers, dtype, changes, what):
    workers.script = {"flax": _steps(**changes), "timm": _steps(), "timm-compile": _steps()}
    with pytest.raises(SidesDisagree, match=rf"^flax's {what} differ from timm's"):
        _measure(dtype=dtype, benchmark="training")
    assert not set(SIDES) & set(workers.log)


def test_training_steps_that_differ_by_rounding_are_timed(workers):
    rounded = _steps(losses=[6.9, 6.500001], gradients=[0.500001, 2e-2, 4e-5, 0])  # a key bias without any gradient
    workers.script = {"flax": rounded, "timm": _steps(), "timm-compile": _steps()}
    assert _measure(benchmark="training").sides["flax"].difference == pytest.approx(1e-6 / 6.9)
    assert workers.log.count("flax") == 2


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", 0.01 / 1.01), ("float32", None)])
def test_the_distance_from_float32_is_told_of_all_sides_in_bfloat16(workers, dtype, expected):
    sides = _measure(dtype=dtype).sides
    assert [times.from_float32 for times in sides.values()] == [expected and pytest.approx(expected)] * 3


def test_flops_and_peak_are_one_figure_for_all_sides():
    def times(**told) -> Times:
        return Times(Ready({}, {}, 1, 0.0, 0.0, 0.0, **told))

    sides = {"flax": times(flops_per_call=6, peak_flops=3.0), "timm": times(peak_flops=4.0), "timm-compile": Times()}
    measured = Measured(_task(), "timm", sides)
    assert (measured.flops_per_call, measured.peak_flops) == (6, 4.0)
    assert Measured(_task(), "timm", {"timm": Times()}).peak_flops is None


def test_a_failed_side_is_a_row_and_the_others_go_on(workers):
    workers.script = {"timm-compile": SideFailed("no compiler")}
    measured = _measure()
    assert list(measured.timed) == ["flax", "timm"]
    assert "failed: no compiler" in table_lines([as_json("inference", [measured])])[-1]


def test_the_largest_common_batch_is_searched_once_per_framework_and_attention(monkeypatch):
    fitting, asked = {"flax": 2048, "flax-cudnn": 1024, "timm": 4096}, []

    def largest(side, task, environment, *, at_most, patience):
        asked.append((side, at_most))
        return min(fitting[side], at_most)

    monkeypatch.setattr(measure, "largest_batch", largest)
    found = measure.largest_common_batch(_task(batch_size=256), SIDES, environment={}, say=lambda _: None)
    assert (found, asked) == (1024, [("flax", 4096), ("flax-cudnn", 2048), ("timm", 1024)])


def test_a_batch_that_does_not_fit_at_all_is_told(monkeypatch):
    def fail(*_, **__):
        raise SideFailed("out of memory", out_of_memory=True)

    monkeypatch.setattr(measure, "largest_batch", fail)
    with pytest.raises(SideFailed, match=r"^flax at batch 256: out of memory; start from a smaller"):
        measure.largest_common_batch(_task(batch_size=256), ["flax"], environment={}, say=lambda _: None)


@dataclass(frozen=True)
class _SmallTask:
    """Whose program writes down what is done with it; `largest` is the batch that memory allows."""

    batch_size: int = 8
    largest: int = 64
    log: list = field(default_factory=list)

    def loader(self, side):
        return f"{__name__}:_load_small"


def _load_small(task, side):
    task.log.append(f"load {task.batch_size}")

    def check():
        if task.batch_size > task.largest:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def told(name, answer=None):
        return lambda *_: task.log.append(name) or answer

    return Program(
        check,
        run=told("run"),
        facts={},
        rest=told("rest"),
        warm_up_s=0.0,
        peak_bytes=told("peak_bytes", 5),
        flops=told("flops", 6),
        peak_flops=told("peak_flops", 7.0),
        float32=told("float32", 8),
    )


class _Pipe:
    """The worker's end: gives it the orders, and keeps its answers."""

    def __init__(self, *orders):
        self.orders, self.answers = list(orders), []

    def recv(self):
        return self.orders.pop(0)

    def send(self, answer):
        self.answers.append(answer)


@pytest.mark.parametrize(("largest", "at_most", "found"), [(64, 4096, 64), (100, 4096, 64), (8, 16, 8), (64, 32, 32)])
def test_the_batch_is_doubled_until_anything_fails_or_enough_is_known(largest, at_most, found):
    task, pipe = _SmallTask(largest=largest), _Pipe()
    worker._search("timm", task, pipe, at_most=at_most)
    assert pipe.answers == [found]
    assert task.log.count("rest") == task.log.count("run")  # each gives its memory to the next


def test_a_search_whose_first_batch_fails_tells_why():
    with pytest.raises(RuntimeError, match="illegal memory access"):
        worker._search("timm", _SmallTask(largest=4), _Pipe(), at_most=64)


def test_a_side_gives_back_memory_whenever_others_have_their_turn_and_tells_its_peak_before_it_takes_more():
    task, pipe = _SmallTask(), _Pipe("warm up", "round", None)
    worker._take_turns("timm", task, pipe)
    loaded, ready, turn = pipe.answers
    assert loaded == "loaded" and isinstance(turn, Round)
    assert (ready.peak_bytes, ready.flops_per_call, ready.peak_flops, ready.float32) == (5, 6, 7.0, 8)
    assert task.log == [
        *("load 8", "run", "flops", "rest"),
        *("run", "peak_bytes", "peak_flops", "float32", "rest"),
        *("run", "rest"),
    ]


def test_a_side_that_hangs_has_failed():
    with worker.Worker("timm", _SmallTask(), {}, work=_hang, patience=0.1) as hanging:
        with pytest.raises(SideFailed, match=r"^no answer within 0\.1 s$"):
            _ = hanging.ready
        hanging._process.join(5)
        assert not hanging._process.is_alive()


def _hang(*_):
    time.sleep(600)


@pytest.mark.parametrize(
    ("device", "dtype", "sides"),
    [
        ("cpu", "bfloat16", ["flax", "timm", "timm-compile"]),
        ("gpu", "bfloat16", list(SIDES)),
        ("gpu", "float32", ["flax", "timm", "timm-compile", "timm-channels-last"]),
    ],
)
def test_the_sides_that_suit_the_device(device, dtype, sides):
    assert default_sides(device, dtype) == sides


def test_flops_are_those_of_the_paper_without_the_keys_and_values_that_need_not_be_computed():
    forward = flops_per_image("ti", training=False)
    assert 0.95 < forward / (2 * multiply_adds(get_config("ti"))) < 0.99
    # the gradient of a product is two more, but images need none
    assert 2.95 < flops_per_image("ti", training=True) / forward < 3


def test_the_model_table_counts_what_the_paper_counts():
    assert parameters(get_config("ti")) == 7_014_800
    assert multiply_adds(get_config("ti")) / 1e9 == pytest.approx(1.6, abs=0.05)
    assert multiply_adds(get_config("15-dagger-408")) / 1e9 == pytest.approx(21.4, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("benchmark", "batch_size"), [("inference", 2), ("training", 2), pytest.param("training", 1, id="training-unmixed")]
)
def test_a_small_run(benchmark, batch_size, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", QUICK_COMPILATION)
    monkeypatch.setattr("benchmarks.command.Task", BriefTask)
    path = tmp_path / "result.json"
    flags = f"--variant ti --batch-size {batch_size} --repeats 1 --device cpu --sides flax timm --json"
    assert main(benchmark, [*flags.split(), str(path)]) == 0
    written = json.loads(path.read_text())
    (result,) = written["results"]
    assert written["benchmark"] == benchmark and written["machine"]["cores"] >= 1
    assert {"jax", "torch", "timm"} <= written["software"].keys()
    assert (result["variant"], result["batch_size"], result["dtype"]) == ("ti", batch_size, "float32")
    assert result["flops_per_call"] > 2e9 * batch_size and result["peak_flops"] > 0
    for side in ("flax", "timm"):
        times = result["sides"][side]
        assert times["failure"] is None and times["difference"] < 1e-5
        assert len(times["rounds_s_per_call"]) == 1
        assert times["images_per_s"] == pytest.approx(batch_size / times["median_s_per_call"])
    assert result["times_as_fast_as_best_timm"]["flax"]["ratio"] > 0
    rows = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith(f"| ti | {batch_size} | float32 |")
    ]
    assert len(rows) == 2
