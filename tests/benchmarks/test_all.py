"""`python -m benchmarks`: what it would run can be run, and it ends in time."""

import json
import time

import pytest

from benchmarks import command
from benchmarks.__main__ import main, plan, run


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_plans_flags_are_those_of_the_benchmarks(device):
    commands = plan(device)
    assert len(commands) >= 4
    for module, *flags in commands.values():
        if module in ("inference", "training"):
            args = command._parser(module).parse_args(flags)
            command._check(command._parser(module), args, module, device)


def test_a_benchmark_that_takes_too_long_is_ended_and_those_after_it_are_not_begun(tmp_path, capfd):
    commands = {"first": ["no_such_benchmark"], "second": ["startup"], "third": ["startup"]}
    start = time.monotonic()
    assert run(commands, tmp_path, start + 6) == 1
    assert time.monotonic() - start < 30
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.endswith("error: first failed with status 1; second was not finished; third was not run")


def test_a_missing_folder_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--device", "cpu", "--output", str(tmp_path / "none")])
    assert stopped.value.code == 2
    assert "no such folder" in capsys.readouterr().err


def test_every_committed_result_says_where_it_was_measured():
    files = list(command.Path("benchmarks/results").glob("*.json"))
    assert files
    for file in files:
        assert json.loads(file.read_text())["machine"]["cpu"]
