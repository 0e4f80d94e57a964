"""The benchmark commands: what they refuse, how they end, and whole small runs."""

import json
from pathlib import Path

import pytest

from benchmarks import command, data, end_to_end, inference
from benchmarks.command import workers_environment
from benchmarks.result import is_result
from benchmarks.rounds import Measured, Times
from benchmarks.task import ModelTask
from benchmarks.worker import Ready, SideFailed
from convert.command_line import run
from crossvit_jax.config import VARIANTS
from tests.benchmarks.brief import CLASSES
from tests.small_model import small_config
from tests.train.small_weights import save_small, small_timm_model
from train.cost.flops import flops_per_image


@pytest.mark.parametrize(
    ("benchmark", "flags", "says"),
    [
        (inference, "--batch-size 0", "--batch-size"),
        (inference, "--variant resnet", "invalid choice"),
        (inference, "--json /no/such/folder/x.json --device cpu", "/no/such/folder does not exist"),
        (inference, "--json /proc/x.json --device cpu", "cannot be written to"),
        (inference, "--repeat 3", "unrecognized arguments"),
        (data, "--repeats 0", "--repeats"),
        (data, "--sides flax", "--sides"),
        (end_to_end, "--workers 0", "--workers"),
        (end_to_end, "--images 7 --batch-size 8", "--images 7 do not fill a batch of 8"),
    ],
)
def test_a_wrong_flag_is_one_line_and_status_2(benchmark, flags, says, capsys, monkeypatch):
    if "/proc" in flags:
        monkeypatch.setattr("os.access", lambda *_: False)  # whoever runs this may be root
    try:
        status = benchmark.main(flags.split())
    except SystemExit as stopped:
        status = stopped.code
    error = capsys.readouterr().err
    assert status == 2 and says in error and error.count("\n") == 1


@pytest.mark.parametrize("content", [b"\x89PNG", b"[1]", b'{"mean": 1}'])
def test_a_file_that_no_benchmark_wrote_is_not_replaced(content, tmp_path, capsys):
    file = tmp_path / "x"
    file.write_bytes(content)
    assert inference.main(["--device", "cpu", "--json", str(file)]) == 2
    error = capsys.readouterr().err
    assert f"{file} exists and was not written by this command" in error and error.count("\n") == 1
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    ("text", "replaced"), [("", True), ('{"benchmark": "training"}', True), ("{}", False), ("[1]", False)]
)
def test_results_may_be_replaced_and_empty_files_filled(text, replaced, tmp_path):
    file = tmp_path / "x.json"
    file.write_text(text)
    assert is_result(file) is replaced


@pytest.mark.parametrize(
    ("benchmark", "flags", "missing"), [(end_to_end, ["--device", "cpu"], "grain"), (data, [], "simplejpeg")]
)
def test_without_a_package_of_the_pipeline_nothing_is_started_and_one_line_says_which(
    benchmark, flags, missing, monkeypatch, capsys
):
    found = command.importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == missing else found(name))
    monkeypatch.setattr(command, "measure", None)
    monkeypatch.setattr(end_to_end, "write_photographs", None)
    assert benchmark.main(flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"error: the input pipelines need {missing}: pip install -e '.[train]'")


def test_a_cache_of_compiled_programs_that_was_asked_for_is_used(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    assert workers_environment("gpu", tmp_path)["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "compiled")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/shared")
    assert workers_environment("cpu", tmp_path)["JAX_COMPILATION_CACHE_DIR"] == "/shared"


@pytest.fixture
def measured(monkeypatch):
    """What `measure` gives, or raises, by variant."""
    answers = {}

    def fake(task, sides, **_):
        answer = answers.get(task.variant, {side: _times() for side in sides})
        if isinstance(answer, Exception):
            raise answer
        return Measured(task, answer, "timm")

    monkeypatch.setattr(command, "measure", fake)
    monkeypatch.setattr(ModelTask, "write_weights", lambda task: None)
    return answers


def _times(failure: str | None = None) -> Times:
    return Times(Ready({}, {}, {}), [1.0], 0.0, failure)


def test_what_was_measured_before_a_failure_is_printed_and_written(measured, tmp_path, capsys):
    measured["s"] = SideFailed("no memory")
    file = tmp_path / "x.json"
    flags = ["--device", "cpu", "--variants", "ti", "s", "--json", str(file)]
    assert inference.main(flags, "training") == 1
    out, error = capsys.readouterr()
    assert out.count("| ti |") == 3 and out.startswith("CrossViT training; ")
    assert error.splitlines()[-1] == "python -m benchmarks.training: error: no memory"
    assert [result["variant"] for result in json.loads(file.read_text())["results"]] == ["ti"]


def test_a_failed_side_of_timms_is_a_row_a_note_and_status_1(measured, capsys):
    measured["ti"] = {"flax": _times(), "timm": _times(), "timm-compile": _times("out of memory")}
    assert inference.main(["--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "failed: out of memory" in out and "Not beside timm at its best" in out


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [(SideFailed("no compiler"), 1, "x: error: no compiler"), (KeyboardInterrupt(), 130, "x: interrupted")],
)
def test_what_stops_a_benchmark_is_one_line_and_a_status(error, status, line, capsys):
    def stopped():
        raise error

    assert run("x", stopped, failure=1) == status
    told = capsys.readouterr().err
    assert line in told and told.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("benchmark", "batch_size"), [("inference", 2), ("training", 2)])
def test_a_small_run(benchmark, batch_size, here, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.sides.timm._model", lambda task: small_timm_model(CLASSES))
    monkeypatch.setitem(VARIANTS, "ti", small_config(CLASSES).replace(name="ti"))
    monkeypatch.setattr(ModelTask, "write_weights", lambda task: save_small(Path(task.weights), None, classes=CLASSES))
    path = tmp_path / "result.json"
    flags = f"--variant ti --batch-size {batch_size} --repeats 1 --device cpu --sides flax timm --json"
    assert inference.main([*flags.split(), str(path)], benchmark) == 0
    written = json.loads(path.read_text())
    (result,) = written["results"]
    assert written["benchmark"] == benchmark and written["machine"]["cores"] >= 1
    assert {"jax", "torch", "timm"} <= written["software"].keys()
    assert (result["variant"], result["batch_size"], result["dtype"]) == ("ti", batch_size, "float32")
    flops = flops_per_image(VARIANTS["ti"], gradient=benchmark == "training")
    assert result["flops_per_call"] == batch_size * flops > 0 and result["peak_flops"] > 0
    for side in ("flax", "timm"):
        times = result["sides"][side]
        assert times["failure"] is None and times["difference"] < 1e-5
        assert len(times["seconds"]) == 1
    rows = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith(f"| ti | {batch_size} | float32 |")
    ]
    assert len(rows) == 2
