"""The benchmark commands: what they refuse, how they end, rows as they come, and a whole small run."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import command
from benchmarks.command import main, workers_environment, writable_json
from benchmarks.rounds import Measured, SidesDisagree, Times
from benchmarks.sides.model_flops import flops_per_image
from benchmarks.worker import Ready, Round, SideFailed
from convert.command_line import Parser, run
from convert.errors import ConversionError
from crossvit_jax.config import VARIANTS
from tests.benchmarks.brief import CLASSES, BriefTask
from tests.small_model import small_config
from tests.train.small_weights import save_small


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (SideFailed("no compiler"), 1, "x: error: no compiler"),
        (SidesDisagree("far apart"), 1, "x: error: far apart"),
        (OSError(28, "No space left on device", "x.json"), 1, "x: error: x.json: No space left on device"),
        (ConversionError("no onnx"), 2, "x: error: no onnx"),
        (KeyboardInterrupt(), 130, "x: interrupted"),
    ],
)
def test_what_stops_a_benchmark_is_one_line_and_a_status(error, status, line, capsys):
    def command():
        raise error

    assert run("x", command, failure=1) == status
    told = capsys.readouterr().err
    assert line in told and told.count("\n") == 1


def test_sigterm_ends_a_benchmark_with_a_line_and_without_its_folder(tmp_path):
    program = """
import sys, tempfile, time
from convert.command_line import Parser, run
def command():
    with tempfile.TemporaryDirectory():
        print("running", flush=True)
        time.sleep(99)
sys.exit(run("x", command, failure=1))
"""
    with subprocess.Popen(
        [sys.executable, "-c", program],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "running\n"
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (143, "x: terminated\n")
    assert not list(tmp_path.iterdir())


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


@pytest.mark.parametrize(
    ("file", "says"), [("/proc/x.json", "No such file"), (f"/{'x' * 256}", "too long"), (f"/{'x' * 256}/x", "too long")]
)
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(file, says, capsys):
    with pytest.raises(SystemExit, match="2"):
        main("inference", ["--device", "cpu", "--json", file])
    error = capsys.readouterr().err
    assert "--json" in error and f"{file}: " in error and says in error and error.count("\n") == 1


@pytest.mark.parametrize("content", [b"\x89PNG", b"[1]", b'{"mean": 1}'])
def test_a_file_that_no_benchmark_wrote_is_not_replaced(content, tmp_path, capsys):
    file = tmp_path / "x"
    file.write_bytes(content)
    with pytest.raises(SystemExit, match="2"):
        main("inference", ["--device", "cpu", "--json", str(file)])
    error = capsys.readouterr().err
    assert f"--json {file} exists and was not written by this command" in error and error.count("\n") == 1
    assert file.read_bytes() == content


def test_results_may_be_replaced_and_empty_files_filled(tmp_path):
    parser, file = Parser(prog="x"), tmp_path / "x.json"
    for content in ("", '{"benchmark": "training"}'):
        file.write_text(content)
        writable_json(parser, file)  # else it would end the program


def test_cudnns_attention_needs_a_gpu(capsys):
    with pytest.raises(SystemExit, match="2"):
        main("inference", ["--device", "cpu", "--sides", "flax-cudnn", "timm"])
    assert "--sides flax-cudnn needs a GPU and --dtype bfloat16; this is cpu, float32" in capsys.readouterr().err


def test_a_cache_of_compiled_programs_that_was_asked_for_is_used(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    own = workers_environment("gpu", tmp_path, one_at_a_time=False)
    assert own["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "compiled")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/shared")
    assert workers_environment("cpu", tmp_path, one_at_a_time=False)["JAX_COMPILATION_CACHE_DIR"] == "/shared"


@pytest.fixture
def measured(monkeypatch):
    """What `measure` gives, or raises, by variant."""
    answers = {}

    def fake(task, sides, **_):
        answer = answers.get(task.variant, {side: _times() for side in sides})
        if isinstance(answer, Exception):
            raise answer
        return Measured(task, "timm", answer)

    monkeypatch.setattr(command, "measure", fake)
    monkeypatch.setattr("benchmarks.sides.timm.write_weights", lambda *_: None)
    return answers


def _times(failure: str | None = None) -> Times:
    return Times(Ready(np.ones(2), {}, 5, 1.0, 2.0, 3.0), [Round(1.0, 0.0)], 0.0, failure)


def test_what_was_measured_before_a_failure_is_printed_and_written(measured, tmp_path, capsys):
    measured["s"] = SideFailed("no memory")
    file = tmp_path / "x.json"
    assert main("training", ["--device", "cpu", "--variants", "ti", "s", "--json", str(file)]) == 1
    out, error = capsys.readouterr()
    assert out.count("| ti |") == 3 and "The goal" in out
    assert error.splitlines()[-1] == "python -m benchmarks.training: error: no memory"
    assert [result["variant"] for result in json.loads(file.read_text())["results"]] == ["ti"]


def test_rows_of_several_variants_share_a_head(measured, capsys):
    assert main("inference", ["--device", "cpu", "--variants", "ti", "s"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("| variant")]) == 1
    assert len([line for line in lines if line.startswith(("| ti", "| s"))]) == 6


def test_a_failed_side_of_timms_is_a_row_a_note_and_status_1(measured, capsys):
    measured["ti"] = {"flax": _times(), "timm": _times(), "timm-compile": _times("out of memory")}
    assert main("inference", ["--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "failed: out of memory" in out and "Not beside timm at its best" in out
    assert "The goal" not in out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("benchmark", "batch_size"), [("inference", 2), ("training", 2), pytest.param("training", 1, id="training-unmixed")]
)
def test_a_small_run(benchmark, batch_size, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.command.Task", BriefTask)
    monkeypatch.setitem(VARIANTS, "ti", small_config(CLASSES).replace(name="ti"))
    monkeypatch.setattr(
        "benchmarks.sides.timm.write_weights", lambda variant, path: save_small(path, None, classes=CLASSES)
    )
    path = tmp_path / "result.json"
    flags = f"--variant ti --batch-size {batch_size} --repeats 1 --device cpu --sides flax timm --json"
    assert main(benchmark, [*flags.split(), str(path)]) == 0
    written = json.loads(path.read_text())
    (result,) = written["results"]
    assert written["benchmark"] == benchmark and written["machine"]["cores"] >= 1
    assert {"jax", "torch", "timm"} <= written["software"].keys()
    assert (result["variant"], result["batch_size"], result["dtype"]) == ("ti", batch_size, "float32")
    flops = flops_per_image("ti", training=benchmark == "training")
    assert result["flops_per_call"] == batch_size * flops > 0 and result["peak_flops"] > 0
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
