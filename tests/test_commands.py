"""What every command owes its user: any standard streams will do, and an address is no path."""

import contextlib
import importlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from convert import streams as standard_streams
from tests.train.small_weights import save_small

_COMMANDS = {
    "convert.__main__": ["a.pth", "b.pth"],
    "train.main": [],
    "train.evaluate": ["--weights=w", "--dataset=digits"],
    "train.predict": ["--weights=w", "p.png"],
    "train.serve": ["--weights=w"],
    "train.compile": [],
    "benchmarks.accuracy": ["w"],
    "benchmarks.data": [],
    "benchmarks.deploy.__main__": ["--runs=r"],
    "benchmarks.detection": [],
    "benchmarks.end_to_end": [],
    "benchmarks.inference": [],
    "benchmarks.serving": ["--weights=w"],
    "benchmarks.startup": [],
    "benchmarks.table": ["x.json"],
}
_PATHS = [
    ("convert.__main__", ["", "out.pth"]),
    ("convert.__main__", ["w.pth", ""]),
    *(("convert.__main__", ["w.pth", "out.onnx", flag, ""]) for flag in ("--calibrate", "--compare")),
    *(("train.main", [flag, ""]) for flag in ("--init", "--dataset", "--data-dir", "--output", "--resume")),
    *(("train.compile", [flag, ""]) for flag in ("--init", "--dataset", "--data-dir", "--output")),
    ("train.evaluate", ["--weights", "", "--dataset=digits"]),
    *(("train.evaluate", ["--weights=w", "--dataset=digits", flag, ""]) for flag in ("--data-dir", "--output")),
    ("train.evaluate", ["--weights=w", "--dataset", ""]),
    ("train.predict", ["--weights", "", "p.png"]),
    ("train.serve", ["--weights", ""]),
    ("train.predict", ["--weights=w", "p.png", "--attention", ""]),
    ("train.predict", ["--weights=w", ""]),
    *((f"benchmarks.{name}", ["--json", ""]) for name in ("inference", "data", "end_to_end", "startup")),
    ("benchmarks.deploy.__main__", ["--runs", ""]),
    *(("benchmarks.deploy.__main__", ["--runs=r", flag, ""]) for flag in ("--dataset", "--data-dir", "--json")),
    ("benchmarks.table", ["x.json", "--plot", ""]),
    ("benchmarks.table", [""]),
]
_ROOT = Path(__file__).parents[1]


def _main(command):
    return importlib.import_module(command).main


def _status(command, argv):
    try:
        return _main(command)(argv)
    except SystemExit as stopped:
        return stopped.code


class NotebookStream(io.TextIOBase):
    """As Jupyter's: it takes text, and is no file."""

    encoding = "UTF-8"

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text
        return len(text)

    def writable(self):
        return True


def _ascii():
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii")


def _closed():
    stream = io.StringIO()
    stream.close()
    return stream


def _unread():
    """A pipe that nobody reads any more."""
    reading, writing = os.pipe()
    os.close(reading)
    return open(writing, "w", encoding="utf-8")


_STREAMS = {"none": lambda: None, "closed": _closed, "notebook": NotebookStream, "ascii": _ascii, "unread": _unread}


def _status_with(kind, monkeypatch, command, argv):
    """Runs a command with standard output and errors of one kind, and no input; its status, and the output."""
    out, err = _STREAMS[kind](), _STREAMS[kind]()
    _main(command)  # imported with pytest's streams, which logging keeps
    with monkeypatch.context() as patch:  # here and no earlier: pytest sets its own before a test
        for name, stream in (("stdin", None), ("stdout", out), ("stderr", err)):
            patch.setattr(sys, name, stream)
        status = _status(command, argv)
    if kind == "unread":
        for stream in (out, err):
            with contextlib.suppress(OSError):  # what it holds can be written nowhere
                stream.close()
    return status, out


@pytest.mark.parametrize("kind", _STREAMS)
@pytest.mark.parametrize("command", _COMMANDS)
def test_a_wrong_flag_has_its_status_whatever_the_streams_are(command, kind, monkeypatch):
    assert _status_with(kind, monkeypatch, command, [*_COMMANDS[command], "--no-such-flag=猫"])[0] == 2


@pytest.mark.parametrize("kind", _STREAMS)
@pytest.mark.parametrize("command", _COMMANDS)
def test_help_ends_well_whatever_the_streams_are(command, kind, monkeypatch):
    status, out = _status_with(kind, monkeypatch, command, ["--help"])
    assert status == 0
    if kind == "notebook":
        assert out.text.startswith("usage: ")


@pytest.mark.parametrize("kind", _STREAMS)
def test_work_is_done_whatever_the_streams_are(kind, monkeypatch, tmp_path):
    (tmp_path / "猫").mkdir()
    source = save_small(tmp_path / "猫" / "source.safetensors", "abc")
    argv = [str(source), str(tmp_path / "猫" / "犬.pth")]
    status, out = _status_with(kind, monkeypatch, "convert.__main__", argv)
    assert status == (141 if kind == "unread" else 0)
    assert (tmp_path / "猫" / "犬.pth").exists()
    if kind == "notebook":
        assert f"written     {tmp_path}/猫/犬.pth\n" in out.text
    elif kind == "ascii":
        assert f"written     {tmp_path}/\\u732b/\\u72ac.pth\n".encode() in out.buffer.getvalue()


def test_predictions_are_printed_in_a_notebook(monkeypatch, tmp_path):
    weights = save_small(tmp_path / "w.safetensors", "abc")
    Image.new("RGB", (50, 50)).save(tmp_path / "猫.png")
    argv = [f"--weights={weights}", "--format=csv", str(tmp_path / "猫.png")]
    status, out = _status_with("notebook", monkeypatch, "train.predict", argv)
    assert status == 0
    assert out.text.splitlines()[0] == "path,rank,class,index,probability"
    assert out.text.splitlines()[1].startswith(f"{tmp_path}/猫.png,1,")


@pytest.mark.parametrize(
    ("command", "status"),
    [(["train.compile", "--help"], 0), (["train.main", "--lr=x"], 2), (["train.predict", "--weights=w", "-"], 2)],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_process_without_streams_has_its_status(command, status):
    shell = 'exec "$0" "$@" <&- >&- 2>&-'
    done = subprocess.run(["sh", "-c", shell, sys.executable, "-m", *command], cwd=_ROOT, timeout=300)
    assert done.returncode == status


def test_what_libraries_print_goes_into_no_file_where_the_streams_are_closed(tmp_path):
    program = """
import os, subprocess, sys
from convert.streams import open_streams
open_streams()
with open(sys.argv[1], "w") as file:
    assert file.fileno() > 2
    for number in (1, 2):
        os.write(number, b"a warning")
    subprocess.run(["sh", "-c", "echo more; echo more >&2; cat"], check=True)
    print("text", file=sys.stderr)
    file.write(f"weights {sys.stdin.read()!r}")
"""
    shell = 'exec "$0" "$@" <&- >&- 2>&-'
    file = tmp_path / "weights"
    subprocess.run(["sh", "-c", shell, sys.executable, "-c", program, str(file)], cwd=_ROOT, check=True, timeout=60)
    assert file.read_text() == "weights ''"


def test_bytes_of_a_file_name_that_are_no_text_are_printed_as_they_are(monkeypatch):
    for encoding in ("utf-8", "ascii"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        standard_streams.open_streams()
        print("a\udcff…", end="", flush=True)
        assert stream.buffer.getvalue() == b"a\xff" + ("…".encode() if encoding == "utf-8" else b"\\u2026")


def test_a_run_whose_terminal_was_closed_goes_on_without_it(monkeypatch, capsys):
    class Hung(NotebookStream):
        def write(self, text):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(sys, "stdout", Hung())
    standard_streams.tell("epoch 1")
    assert capsys.readouterr().err == "note: nothing more is printed: Input/output error\n"
    monkeypatch.setattr(sys, "stderr", Hung())
    standard_streams.tell("epoch 2")


def test_a_run_whose_output_nobody_reads_any_more_goes_on(monkeypatch, capsys):
    with _unread() as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        standard_streams.tell("epoch 1")
        standard_streams.tell("epoch 2")
    assert capsys.readouterr().err == "note: nothing more is printed: Broken pipe\n"


# --- names ---


@pytest.mark.parametrize("name", ["train", "evaluate", "predict", "convert", "compile", "serve"])
def test_a_command_is_called_as_it_was_typed(name, capsys):
    wrong = ["--nonsense"]
    assert _status("train.__main__", [name, *wrong]) == 2
    assert capsys.readouterr().err.startswith(f"crossvit {name}: error: ")
    assert _status("train.__main__", [name, "--help"]) == 0
    assert f"\n  crossvit {name} " in capsys.readouterr().out.partition("examples:")[2]
    module = {"train": "train.main", "convert": "convert.__main__"}.get(name, f"train.{name}")
    assert _status(module, wrong) == 2
    assert capsys.readouterr().err.startswith(f"python -m {module.removesuffix('.__main__')}: error: ")


# --- addresses ---


@pytest.mark.parametrize(("command", "argv"), _PATHS, ids=lambda value: value if isinstance(value, str) else str(value))
def test_an_address_is_refused_before_anything_is_made(command, argv, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert _status(command, [arg or "gs://bucket/run" for arg in argv]) == 2
    error = capsys.readouterr().err
    assert "gs://bucket/run is an address, not a path on this machine" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_of_images_and_a_name_of_weights_may_be_no_address_either(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert _status("train.main", ["--dataset=folder:s3://bucket/train"]) == 2
    assert "s3://bucket/train is an address" in capsys.readouterr().err
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert _status("convert.__main__", ["hf-hub:nobody/nothing-of-this-name", "out.pth"]) == 2
    assert "is not in the cache" in capsys.readouterr().err
