"""`python -m benchmarks`: what it would run can be run, it ends in time, and leaves nothing behind."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import __main__ as everything
from benchmarks import command
from benchmarks.__main__ import Entry, main, plan, run
from benchmarks.table import MODELS

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


class _Accepted(Exception):
    """The flags passed every check."""


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_every_entry_of_the_plan_is_a_command_that_takes_its_flags(device, monkeypatch, tmp_path):
    def accept(*_, **__):
        raise _Accepted

    for name, entry in plan(device).items():
        benchmark, *flags = entry.flags
        module = importlib.import_module(f"benchmarks.{benchmark}")
        arguments = [benchmark] if benchmark in MODELS else []
        owner = command if arguments else module
        monkeypatch.setattr(owner, "_run", accept)
        monkeypatch.setattr(owner, "pick_device", lambda parser, args: args.device, raising=False)
        if benchmark in everything._KEEP_WHAT_IS_DONE:
            flags += ["--seconds", "60"]
        with pytest.raises(_Accepted):
            module.main(*arguments, [*flags, "--json", str(tmp_path / f"{name}.json")])


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the benchmarks move: the fake of `_run` takes as many seconds as `takes` has for an entry."""
    state = {"now": 0.0, "takes": {}, "allowed": {}}

    def fake_run(command, environment, seconds):
        name = Path(command[-1]).stem
        state["allowed"][name] = seconds
        took = state["takes"].get(name, 0.0)
        state["now"] += min(took, seconds)
        return "was not finished" if took > seconds else None

    monkeypatch.setattr(everything, "_run", fake_run)
    monkeypatch.setattr(everything.time, "monotonic", lambda: state["now"])
    return state


def test_a_benchmark_takes_its_share_at_most_and_what_it_leaves_is_for_the_others(clock, tmp_path, capsys):
    clock["takes"] = {"a": 10.0, "b": 1000.0, "c": 1000.0}
    entries = {name: Entry(["startup"], share) for name, share in (("a", 0.5), ("b", 0.4), ("c", 0.9), ("d", 0.5))}
    assert run(entries, tmp_path, 0.0, 100.0) == 1
    assert clock["allowed"] == {"a": 50.0, "b": 40.0, "c": 50.0}
    error = capsys.readouterr().err
    assert error.endswith("error: b was not finished; c was not finished; d was not run\n")


def test_the_last_benchmark_may_take_all_the_time_that_is_left(clock, tmp_path):
    run({"a": Entry(["startup"], 0.5), "b": Entry(["startup"], 0.1)}, tmp_path, 0.0, 100.0)
    assert clock["allowed"] == {"a": 50.0, "b": 100.0}


def test_a_benchmark_that_has_rounds_is_told_when_to_end_them(monkeypatch, tmp_path):
    commands = []
    monkeypatch.setattr(everything, "_run", lambda command, *_: commands.append(command))
    run({"a": Entry(["training"], 0.5), "b": Entry(["startup"], 1.0)}, tmp_path, time.monotonic(), 100.0)
    training, startup = commands
    assert training[3:5] == ["--seconds", "40"]  # 10 seconds before it would be stopped
    assert "--seconds" not in startup


def test_the_time_counts_from_the_start_of_the_command(clock, tmp_path):
    clock["now"] = 70.0
    run({"a": Entry(["startup"], 1.0)}, tmp_path, 0.0, 100.0)
    assert clock["allowed"] == {"a": 30.0}


def test_a_failure_does_not_stop_the_others(tmp_path, capfd):
    entries = {name: Entry(["no_such_benchmark"], 1.0) for name in ("first", "second")}
    assert run(entries, tmp_path, time.monotonic(), 60.0) == 1
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.endswith("error: first failed with status 1; second failed with status 1")


_STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = os.fork()
if child:
    open(sys.argv[1], "w").write(f"{os.getpid()} {child}")
time.sleep(99)
"""


def test_a_benchmark_that_heeds_no_sigterm_is_killed_with_its_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(everything, "_GRACE", 0.2)
    file = tmp_path / "processes"
    problem = everything._run([sys.executable, "-c", _STUBBORN, str(file)], os.environ, 1.5)
    assert problem == "was not finished in 2 s"
    for process in file.read_text().split():
        assert _gone(int(process))


def test_sigterm_ends_everything_and_leaves_no_folder(tmp_path):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    flags = ["--device", "cpu", "--only", "startup", "--output", str(tmp_path / "results")]
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "benchmarks", *flags],
        env=os.environ | {"TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while "## startup" not in process.stdout.readline():
            assert process.poll() is None
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=30)
    assert process.returncode == 143
    assert error.splitlines()[-1] == "python -m benchmarks: terminated"
    assert not list(temporary.iterdir())


def test_an_entry_that_is_not_in_the_plan_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--device", "cpu", "--only", "cpu-training-b"])
    assert "the plan has cpu-inference-ti" in capsys.readouterr().err


def test_results_are_never_replaced(tmp_path, capsys):
    (tmp_path / "data.json").write_text("{}")
    with pytest.raises(SystemExit, match="2"):
        main(["--device", "cpu", "--output", str(tmp_path)])
    assert "has data.json already" in capsys.readouterr().err


@pytest.mark.parametrize(("folder", "says"), [("none/none", "No such file"), ("x" * 256, "File name too long")])
def test_a_folder_that_cannot_be_made_is_refused(folder, says, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--device", "cpu", "--output", str(tmp_path / folder)])
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_by_default_results_go_to_a_new_folder(clock, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["--device", "cpu", "--only", "startup"]) == 0
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("benchmarks-")


def test_every_committed_result_says_where_it_was_measured():
    files = list(RESULTS.glob("*.json"))
    assert files
    for file in files:
        assert json.loads(file.read_text())["machine"]["cpu"]


def _gone(process: int) -> bool:
    """Whether it has ended; a killed child of a killed process is buried by init, which may take a moment."""
    for _ in range(50):
        try:
            if Path(f"/proc/{process}/stat").read_text().split()[2] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False
